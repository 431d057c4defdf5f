"""Blocks that hand codes to their layers: the numbers of the plain blocks, in fewer passes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
from stepquant.runtime.blocks import attention, attention_precision, use_fast_blocks
from stepquant.runtime.blocks.attention import FastAttention
from stepquant.runtime.kernels import onednn
from stepquant.runtime.ops import fused, native

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


@pytest.mark.skipif(onednn.pairs_saturate(), reason="no VNNI: blocks run layer by layer")
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
    assert ours.count["round_"] == ours.count["round"] == 0
    # Only the norm before the output layer is left.
    assert ours.count["native_layer_norm"] == 0 < theirs.count["native_layer_norm"]
    assert ours.count["native_group_norm"] == 1 < theirs.count["native_group_norm"]
    assert ours.count["cat"] < theirs.count["cat"]


def test_diffusers_finds_the_blocks_by_name():
    fast = packed("sd", STATIC)
    names = {type(module).__name__ for module in fast.modules()}
    assert set(fast._repeated_blocks) & names
    before = list(fast._repeated_blocks)
    assert use_fast_blocks(fast)._repeated_blocks == before


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_is_as_near_as_bfloat16_is(masked, monkeypatch):
    fast = packed("sd", STATIC, bits=7)  # as many as blocks take on every CPU: 8 want VNNI
    block = next(m for m in fast.modules() if type(m) is FastAttention)
    predictor(fast)(fast)  # a timestep is in force
    assert block.why_plain() is None  # else `attend` is not what it runs
    x = torch.randn(2, 64, block.to_q.in_features, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 64).masked_fill(torch.arange(64) > 40, -1e4) if masked else None
    inputs = attention.encoded(block, x, None)
    exact = attention.attend(block, inputs, mask, torch.float32)
    monkeypatch.setattr(attention_precision, "MANY_SCORES", 1)
    monkeypatch.setattr(attention_precision, "multiplies_bfloat16", lambda: True)
    ours = []
    native_form = fused.attention_codes
    monkeypatch.setattr(
        fused, "attention_codes", lambda *each: ours.append(1) or native_form(*each)
    )
    found = attention.attend(block, inputs, mask, torch.float32)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() < 0.02 * exact.norm()
    assert len(ours) == (fused.has_native_attention() and not masked)
