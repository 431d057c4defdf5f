"""What the tests of recorded denoisers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.engines.captured_calls import RecordedDenoiser
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import named_arguments
from stepquant.runtime.layers.integer import IntegerLayer


def inputs(model: nn.Module, batch: int, seed: int, step: int = 0) -> tuple[Tensor, dict]:
    """A sample, and the other arguments at one of the recorded steps, the same for all samples."""
    sample, at, conditions = adapter_for(model).random_inputs(model, batch)
    generator = torch.Generator().manual_seed(seed)
    grid = next(m for m in model.modules() if isinstance(m, IntegerLayer)).context.grid
    at = torch.full_like(at, float(grid.timesteps[step]))
    more = {
        name: torch.randn(value.shape, generator=generator)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in conditions.items()
    }
    return torch.randn(sample.shape, generator=generator), {
        "timestep": at,
        **named_arguments(model, more),
    }


def predict(model: nn.Module, given: tuple[Tensor, dict]) -> Tensor:
    with torch.no_grad():
        found = model(given[0], **given[1])
    return found if isinstance(found, Tensor) else found[0]


def assert_alike(model: RecordedDenoiser, plain: nn.Module, batch: int = 2, calls: int = 5) -> None:
    """Other samples, conditions and steps in each call."""
    for number in range(calls):
        given = inputs(plain, batch, seed=number, step=number % 3)
        kept = given[0].clone()
        assert torch.equal(predict(model, given), predict(plain, given))
        assert torch.equal(given[0], kept)


def scale_a_norm(model: nn.Module) -> None:
    norm = next(m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm))
    norm.weight.data = norm.weight.data * 1.5
