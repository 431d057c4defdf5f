"""Blocks that hand codes to their layers: the numbers of the plain blocks, in fewer passes."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from architectures import ARCHITECTURES, build
from stepquant.api import quantize
from stepquant.bench import set_backend
from stepquant.methods import BiasCorrection, TemporalQuantizer
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import named_arguments
from stepquant.recipe import Recipe
from stepquant.runtime import codes
from stepquant.runtime.fast import FAST_CLASSES, use_plain_blocks
from stepquant.runtime.kernels import cpu
from stepquant.runtime.packed import PackedLayer

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}
STATIC = Recipe(name="static", description="One scale for all steps.", steps=())
TABLES = Recipe(
    name="tables",
    description="A scale and a bias for every step.",
    steps=(TemporalQuantizer(), BiasCorrection()),
)
NAMES = ["sd", "sdxl", "dit", "pixart"]
CASES = [(name, recipe) for name in NAMES for recipe in (STATIC, TABLES)]


class Operators(TorchDispatchMode):
    """Counts the operators that run, by their name without overload."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def packed(name, recipe, bits=8):
    architecture = ARCHITECTURES[name]
    result = quantize(build(name), recipe, bits, bits, None, 3, FEW, **architecture.arguments)
    return getattr(result.pipeline, architecture.component)


def predictor(model, batch=2):
    sample, at, conditions = adapter_for(model).random_inputs(model, batch)
    arguments = named_arguments(model, conditions)

    def predict(denoiser):
        with torch.no_grad():
            return denoiser(sample, timestep=at, **arguments)[0]

    return predict


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, PackedLayer)]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=lambda each: getattr(each, "name", each))
def test_fast_blocks_give_what_plain_ones_give(name, recipe):
    fast = packed(name, recipe)
    plain = set_plain(fast)
    predict = predictor(fast)
    found, expected = predict(fast), predict(plain)
    # A value on the border of two codes may go either way; nothing else differs.
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert any(type(module) in FAST_CLASSES.values() for module in fast.modules())


def set_plain(fast):
    plain = use_plain_blocks(copy.deepcopy(fast))
    set_backend(plain, "onednn")
    return plain


def test_rounding_is_part_of_other_passes():
    fast = packed("sd", STATIC)
    predict, plain = predictor(fast), set_plain(fast)
    predict(fast)  # lays the weights out
    predict(plain)
    with Operators() as ours:
        predict(fast)
    with Operators() as theirs:
        predict(plain)
    assert theirs.count["round_"] == sum(len(layer.splits) for layer in layers_of(fast))
    assert ours.count["round_"] == 0
    # The norms before the output and those of `Transformer2DModel` are left.
    assert ours.count["native_layer_norm"] == 0 < theirs.count["native_layer_norm"]
    resnets = sum(type(m).__name__ == "FastResnetBlock2D" for m in fast.modules())
    norms = theirs.count["native_group_norm"] - ours.count["native_group_norm"]
    assert norms == 2 * resnets > 0
    assert ours.count["cat"] < theirs.count["cat"]
