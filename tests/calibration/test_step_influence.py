from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepquant.calibration.step_influence import _between, step_influence
from stepquant.calibration.trajectories import Trajectories
from stepquant.errors import StepQuantError
from stepquant.progress import Reporter
from stepquant.quantizers import StepGrid

QUIET = Reporter(quiet=True)


class Constant(nn.Module):
    """Predicts the same whatever it sees, so that an error at one step reaches no other step."""

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        return (torch.full_like(sample, 3.0),)


def sampler(model: nn.Module, factors: list[float]):
    """Draws with `x <- x - factor * prediction`, a factor for each step."""
    timesteps = torch.arange(len(factors), 0, -1).float()

    def draw(num: int, seed: int, denoiser: nn.Module | None = None) -> Trajectories:
        x = torch.randn(num, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
        seen = []
        for factor, timestep in zip(factors, timesteps, strict=True):
            seen.append(x)
            x = x - factor * model(x, timestep)[0]
        count = torch.arange(num).repeat(len(factors))
        return Trajectories(torch.cat(seen), timesteps.repeat_interleave(num), count, timesteps)

    return draw, StepGrid(timesteps)


def test_what_is_measured_is_what_the_sampler_does_with_a_prediction():
    # An error e at a step moves the image by factor * e; the prediction has a power of 9.
    factors = [2.0, 1.0, 0.5, 0.25, 0.125, 1e9]
    model = Constant()
    draw, grid = sampler(model, factors)
    found = step_influence(model, draw, grid, 4, 0, QUIET)
    expected = torch.tensor([9 * factor**2 for factor in factors[:-1]])
    torch.testing.assert_close(found[:-1], expected, rtol=0.2, atol=0)
    assert found[-1] == found[:-1].min()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_steps_between_measured_ones_lie_on_a_line_of_logarithms():
    found = _between(torch.tensor([0, 2, 5]), torch.tensor([16.0, 4.0, 0.5]), 7)
    torch.testing.assert_close(found, torch.tensor([16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.5]))


def test_long_samplers_are_measured_at_some_steps_only():
    model = Constant()
    factors = [2.0 ** (-row / 4) for row in range(40)]
    draw, grid = sampler(model, factors)
    calls = []
    found = step_influence(
        model, lambda *args: calls.append(args) or draw(*args), grid, 4, 0, QUIET
    )
    assert len(calls) == 13  # twelve, and one that nothing disturbs
    expected = torch.tensor([9 * factor**2 for factor in factors[:-1]])
    torch.testing.assert_close(found[:-1], expected, rtol=0.2, atol=0)


@pytest.mark.parametrize("steps", [1, 2])
def test_with_hardly_any_steps_all_count_alike(steps):
    draw, grid = sampler(Constant(), [1.0] * steps)
    assert step_influence(Constant(), draw, grid, 4, 0, QUIET).tolist() == [1.0] * steps


def test_a_sampler_that_does_not_heed_the_prediction_is_refused():
    model = Constant()
    draw, grid = sampler(model, [1.0, 0.0, 1.0, 1.0])
    with pytest.raises(StepQuantError, match="a disturbed prediction changes images by"):
        step_influence(model, draw, grid, 2, 0, QUIET)
