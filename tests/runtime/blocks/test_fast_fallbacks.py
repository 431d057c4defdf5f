"""What stands in the way of handing codes over: only the blocks around it run layer by layer."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from fast_models import (
    TABLES,
    assert_near,
    blocks_around,
    layers_of,
    packed,
    plain_blocks,
    plain_copy,
    predictor,
)
from stepquant.engines.backend import set_backend
from stepquant.models.adapter import adapter_for
from stepquant.runtime.kernels import onednn
from stepquant.runtime.layers.lora_branch import LoraBranch, attach_branch, detach_branch

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(onednn.pairs_saturate(), reason="no VNNI: blocks run layer by layer"),
]

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "up_blocks.0.resnets.0.conv1"
INNER = [
    "down_blocks.0.resnets.0.norm1",
    "down_blocks.0.resnets.0.nonlinearity",
    "down_blocks.0.resnets.0.dropout",
    "down_blocks.0.attentions.0.transformer_blocks.0.norm3",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.1",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.1",
]


def branch(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spec = layer.spec
    if spec.kind == "linear":
        shapes = ((2, spec.in_channels), (spec.out_channels, 2))
    else:
        shapes = ((2, spec.in_channels, *spec.kernel_size), (spec.out_channels, 2, 1, 1))
    A, B = (torch.randn(shape, generator=generator) for shape in shapes)
    return LoraBranch(A, B, 0.3, 1.0)


@pytest.mark.parametrize("layer", [LAYER, CONV])
def test_a_lora_and_without_it_again(layer):
    fast = packed("sd")
    predict, plain = predictor(fast), plain_copy(fast)
    before = predict(fast)
    for model in (fast, plain):
        inner = model.get_submodule(layer)
        attach_branch(inner, "style", branch(inner))
    assert plain_blocks(fast) == dict.fromkeys(blocks_around(fast, layer), "a LoRA")
    found = predict(fast)
    assert_near(found, predict(plain))
    assert (found - before).norm() > 0.05 * before.norm()
    detach_branch(fast.get_submodule(layer), "style")
    assert plain_blocks(fast) == {} and torch.equal(predict(fast), before)


@pytest.mark.parametrize("name", [LAYER, CONV, *INNER])
@pytest.mark.parametrize("kind", ["after", "before", "accelerate"])
def test_a_hook_is_called(name, kind):
    fast = packed("sd")
    predict = predictor(fast)
    before, module, seen = predict(fast), fast.get_submodule(name), []
    if kind == "after":
        handle = module.register_forward_hook(lambda _, inputs, y: seen.append(y))
    elif kind == "before":
        handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    else:
        hook = ModelHook()
        hook.pre_forward = lambda _, *args, **kwargs: seen.append(args) or (args, kwargs)
        add_hook_to_module(module, hook)
    assert set(plain_blocks(fast)) == blocks_around(fast, name)
    assert_near(predict(fast), before)
    assert len(seen) == (3 if name.endswith("nonlinearity") else 1)
    if kind == "accelerate":
        remove_hook_from_submodules(module)
    else:
        handle.remove()
    assert torch.equal(predict(fast), before)


def test_a_hook_on_all_modules_sees_every_layer():
    fast, seen = packed("sd"), set()
    predict = predictor(fast)
    before = predict(fast)
    handle = register_module_forward_hook(lambda module, inputs, y: seen.add(module))
    try:
        found = predict(fast)
    finally:
        handle.remove()
    assert seen >= set(layers_of(fast))
    assert_near(found, before)


def test_a_layer_itself_is_run_on_codes_under_a_hook():
    """The hook looks at floats before and after; what is between is the layer's own affair."""
    fast = packed("sd")
    layer = fast.get_submodule(CONV)
    x = torch.randn(2, layer.spec.in_channels, 5, 5)
    before = layer(x)
    layer.register_forward_hook(lambda *_: None)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("backend", ["onednn", "reference"])
def test_another_backend(backend):
    fast = packed("sd")
    predict = predictor(fast)
    before = predict(fast)
    set_backend(fast, backend)
    assert set(plain_blocks(fast).values()) == {f"the backend '{backend}'"}
    assert_near(predict(fast), before)
    set_backend(fast, "auto")
    assert plain_blocks(fast) == {} and torch.equal(predict(fast), before)


def test_training_mode():
    fast = packed("sd")
    predict = predictor(fast)
    before = predict(fast)
    fast.train()
    kinds = {type(fast.get_submodule(name)).__name__ for name in plain_blocks(fast)}
    assert kinds == {"FastAttention", "FastBasicTransformerBlock", "FastResnetBlock2D"}
    assert_near(predict(fast), before)
    fast.eval()
    assert torch.equal(predict(fast), before)


def test_other_attention_processors_and_the_default_again():
    fast = packed("sd")
    predict = predictor(fast)
    before = predict(fast)
    fast.set_attn_processor(AttnProcessor())
    reasons = plain_blocks(fast)
    assert set(reasons.values()) == {"the attention processor AttnProcessor"}
    assert {name for name, m in fast.named_modules() if isinstance(m, Attention)} < set(reasons)
    assert_near(predict(fast), before)
    fast.set_default_attn_processor()  # refuses processors that diffusers does not know
    fast.set_attn_processor(AttnProcessor2_0())
    assert plain_blocks(fast) == {} and torch.equal(predict(fast), before)


@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_samples_at_different_timesteps(name):
    fast = packed(name, TABLES)
    plain, steps = plain_copy(fast), layers_of(fast)[0].context.grid.timesteps
    assert layers_of(fast)[0].steps == 3 and steps.unique().numel() == 3
    for at in (steps[[0, 2]], steps[[1, 1]], steps[[2, 0]]):
        predict = predictor(fast, timestep=at.to(torch.int64))
        found = predict(fast)
        assert_near(found, predict(plain))
        apart = "samples at different timesteps"
        assert set(plain_blocks(fast).values()) == (set() if at[0] == at[1] else {apart})
    sample, _, _ = adapter_for(fast).random_inputs(fast, 2)
    assert found.shape[0] == len(sample)


def test_float_layers_in_a_block():
    fast = packed("sd")
    layer = fast.get_submodule(CONV)
    name, _, own = CONV.rpartition(".")
    weight = layer.float_weight()
    plain = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    plain.weight.data.copy_(weight)
    setattr(fast.get_submodule(name), own, plain)
    assert plain_blocks(fast) == {name: "a layer of the class Conv2d"}
    predict = predictor(fast)
    assert bool(predict(fast).isfinite().all())
