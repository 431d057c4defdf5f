"""One precision of attention's float products, in fused blocks and under hooks."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import nn

from fast_models import layers_of, packed, plain_blocks, predictor
from quantize_runs import refused
from stepquant.api import set_attention_precision
from stepquant.runtime.blocks import attention_precision
from stepquant.runtime.blocks.attention import FastAttention
from stepquant.runtime.layers.lora_branch import LoraBranch, attach_branch
from stepquant.runtime.ops import fused, plain

CPU = torch.device("cpu")
NAMES = ["sd", "dit", "pixart"]
BITS = 4  # blocks run on codes on CPUs without VNNI, too

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["torch", "native"])
def bfloat16(request, monkeypatch):
    """As on a CPU that multiplies bfloat16, without and with the kernel of our own."""
    monkeypatch.setattr(attention_precision, "MANY_SCORES", 1)
    monkeypatch.setattr(attention_precision, "multiplies_bfloat16", lambda: True)
    has_native = request.param == "native"
    monkeypatch.setattr(fused, "has_native_attention", lambda: has_native)
    if has_native:
        monkeypatch.setattr(fused, "attention_codes", plain.attention_codes)


def by_leaf(model):
    apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


def by_block(model):
    apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def hook_on_every_module(model):
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda *_: None)


HOOKS = {
    "accelerate": lambda model: cpu_offload(model, CPU),
    "group offloading by leaf": by_leaf,
    "group offloading by block": by_block,
    "torch hooks": hook_on_every_module,
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@pytest.mark.parametrize("name", NAMES)
def test_hooks_change_no_bit(name, hook, bfloat16):
    fast = packed(name, bits=BITS)
    predict = predictor(fast)
    before = predict(fast)
    hooked = copy.deepcopy(fast)
    hook(hooked)
    assert torch.equal(predict(hooked), before)
    if hook is not by_block:
        assert plain_blocks(hooked)


def offloaded_buffers(model):
    cpu_offload(model, CPU, offload_buffers=True)


def lora_that_adds_nothing(model):
    for layer in layers_of(model):
        if layer.spec.kind == "linear":
            a, b = torch.ones(1, layer.spec.in_channels), torch.zeros(layer.spec.out_channels, 1)
            attach_branch(layer, "none", LoraBranch(a, b, 1.0, 1.0))


@pytest.mark.parametrize("bfloat16", ["torch"], indirect=True)
@pytest.mark.parametrize("change", [offloaded_buffers, lora_that_adds_nothing])
@pytest.mark.parametrize("name", NAMES)
def test_these_change_no_bit_where_torch_multiplies(name, change, bfloat16):
    """Our kernel gives codes, for which the output projection must be at hand and alone."""
    fast = packed(name, bits=BITS)
    predict = predictor(fast)
    before = predict(fast)
    changed = copy.deepcopy(fast)
    change(changed)
    assert torch.equal(predict(changed), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_setting_holds_in_both_forms(name, monkeypatch):
    fast = packed(name, bits=BITS)
    predict = predictor(fast)
    found = {}
    for precision in ("auto", "model", "bfloat16"):
        set_attention_precision(fast, precision)
        hooked = copy.deepcopy(fast)
        hook_on_every_module(hooked)
        found[precision] = predict(fast)
        assert torch.equal(predict(hooked), found[precision])
    assert torch.equal(found["auto"], found["model"])  # so few scores are multiplied in float32
    assert not torch.equal(found["model"], found["bfloat16"])
    monkeypatch.setattr(attention_precision, "MANY_SCORES", 1)
    monkeypatch.setattr(attention_precision, "multiplies_bfloat16", lambda: True)
    assert torch.equal(predict(fast), found["bfloat16"])
    set_attention_precision(fast, "model")
    assert torch.equal(predict(fast), found["model"])


def test_a_copy_keeps_the_setting_and_settings_are_checked():
    fast = packed("sd", bits=BITS)
    set_attention_precision(fast, "bfloat16")
    sites = [m for m in copy.deepcopy(fast).modules() if isinstance(m, FastAttention)]
    assert {site.attention_precision for site in sites} == {"bfloat16"}
    assert "unknown attention precision 'float8'" in refused(
        lambda: set_attention_precision(fast, "float8")
    )
    assert "has no attention with integer projections" in refused(
        lambda: set_attention_precision(nn.Linear(1, 1), "auto")
    )
