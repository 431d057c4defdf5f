"""Packed denoisers with fast blocks for tests, and their plain copies."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from architectures import ARCHITECTURES, build
from stepquant.api import quantize
from stepquant.engines.backend import set_backend
from stepquant.methods import BiasCorrection, TemporalQuantizer
from stepquant.methods.recipe import Recipe
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import named_arguments
from stepquant.runtime.blocks import FAST_CLASSES, use_plain_blocks
from stepquant.runtime.kernels import choose
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.ops.layer_spec import LayerSpec

FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}
STATIC = Recipe(name="static", description="One scale for all steps.", steps=())
TABLES = Recipe(
    name="tables",
    description="A scale and a bias for every step.",
    steps=(TemporalQuantizer(), BiasCorrection()),
)


def packed_pipeline(name: str, recipe: Recipe = STATIC, bits: int = 8) -> DiffusionPipeline:
    arguments = ARCHITECTURES[name].arguments
    return quantize(build(name), recipe, bits, bits, None, 3, FEW, **arguments).pipeline


@functools.cache
def _packed(name: str, recipe: str, bits: int) -> nn.Module:
    pipeline = packed_pipeline(name, {"static": STATIC, "tables": TABLES}[recipe], bits)
    return getattr(pipeline, ARCHITECTURES[name].component)


def packed(name: str, recipe: Recipe = STATIC, bits: int = 8) -> nn.Module:
    """A copy that is the test's own; quantizing is done once."""
    return copy.deepcopy(_packed(name, recipe.name, bits))


def predictor(
    model: nn.Module, batch: int = 2, dtype: torch.dtype = torch.float32, **more: object
) -> Callable[[nn.Module], Tensor]:
    """Calls a denoiser on random inputs for `model`; `more` goes to each call."""
    sample, at, conditions = adapter_for(model).random_inputs(model, batch)
    arguments = {"timestep": at, **named_arguments(model, conditions), **more}
    arguments = {name: cast(value, dtype) for name, value in arguments.items()}

    def predict(denoiser: nn.Module) -> Tensor:
        with torch.no_grad():
            return denoiser(sample.to(dtype), **arguments)[0]

    return predict


def cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, dict):
        return {name: cast(each, dtype) for name, each in value.items()}
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floats else value


def plain_copy(fast: nn.Module) -> nn.Module:
    """The same layers, each called by the code of diffusers."""
    plain = use_plain_blocks(copy.deepcopy(fast))
    set_backend(plain, best_kernel())  # the fast blocks' own, layer by layer
    return plain


def best_kernel() -> str:
    """The name of the kernel that packed layers of this machine run on."""
    return choose(LayerSpec("linear", 8, 8, 8, 8), torch.device("cpu")).kernel.name


def layers_of(model: nn.Module) -> list[IntegerLayer]:
    return [module for module in model.modules() if isinstance(module, IntegerLayer)]


def plain_blocks(model: nn.Module) -> dict[str, str]:
    """`{name: reason}` of the blocks that run the code of diffusers."""
    return {
        name: str(block.why_plain())
        for name, block in model.named_modules()
        if hasattr(block, "why_plain") and block.why_plain() is not None
    }


def blocks_around(model: nn.Module, layer: str) -> set[str]:
    """The fast blocks that hand something to `layer` or around it: not all that it lies in."""
    return {
        name
        for name, block in model.named_modules()
        if hasattr(block, "why_plain")
        and layer.startswith(f"{name}.")
        and not layer.startswith(f"{name}.transformer_blocks.")  # which the block only calls
    }


def is_fast(model: nn.Module) -> bool:
    return any(type(module) in FAST_CLASSES.values() for module in model.modules())


def assert_near(found: Tensor, expected: Tensor, share: float = 0.02) -> None:
    """A value on the border of two codes may go either way; nothing else differs."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).float().norm() < share * expected.float().norm()
