"""Blocks that hand codes to their layers: the numbers of the plain blocks, in fewer passes."""

from __future__ import annotations

from collections import Counter

import pytest
from fast_models import (
    STATIC,
    TABLES,
    assert_near,
    is_fast,
    layers_of,
    packed,
    plain_copy,
    predictor,
)
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.runtime import native
from stepquant.runtime.kernels import cpu

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=lambda each: getattr(each, "name", each))
def test_fast_blocks_give_what_plain_ones_give(name, recipe):
    fast = packed(name, recipe)
    plain = plain_copy(fast)
    predict = predictor(fast)
    assert_near(predict(fast), predict(plain))
    assert is_fast(fast) and not is_fast(plain)


@pytest.mark.skipif(cpu.pairs_saturate(), reason="no VNNI: blocks run layer by layer")
@pytest.mark.skipif(not native.available(), reason="torch rounds where there is no library")
def test_rounding_is_part_of_other_passes():
    fast = packed("sd", STATIC)
    predict, plain = predictor(fast), plain_copy(fast)
    predict(fast)  # lays the weights out
    predict(plain)
    with Operators() as ours:
        predict(fast)
    with Operators() as theirs:
        predict(plain)
    assert theirs.count["round_"] == sum(len(layer.splits) for layer in layers_of(fast))
    assert ours.count["round_"] == 0
    # Only the norm before the output layer is left.
    assert ours.count["native_layer_norm"] == 0 < theirs.count["native_layer_norm"]
    assert ours.count["native_group_norm"] == 1 < theirs.count["native_group_norm"]
    assert ours.count["cat"] < theirs.count["cat"]
