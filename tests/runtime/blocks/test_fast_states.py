"""Fast blocks in every state that a model is found in: copied, saved, half, compiled."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from fast_models import (
    TABLES,
    assert_near,
    is_fast,
    layers_of,
    packed,
    packed_pipeline,
    plain_blocks,
    plain_copy,
    predictor,
)
from stepquant.runtime.kernels import onednn, registered_kernels
from stepquant.runtime.layers.integer import IntegerLinear
from stepquant.runtime.ops import fused
from stepquant.runtime.ops.fused import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.refusal import Refusal, RefusalCode

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = Grid(torch.tensor([0.03]), torch.tensor([20], dtype=torch.uint8), None, 255)
needs_vnni = pytest.mark.skipif(onednn.pairs_saturate(), reason="no VNNI: layer by layer")


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_copies_and_pickles_give_the_same_bits(name):
    fast = packed(name, TABLES)
    predict = predictor(fast)
    expected = predict(fast)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert is_fast(other) and torch.equal(predict(other), expected)


def test_saved_and_loaded_it_gives_the_same_bits(tmp_path):
    pipeline = packed_pipeline("sd", TABLES)
    predict = predictor(pipeline.unet)
    expected = predict(pipeline.unet)
    pipeline.save_pretrained(tmp_path)
    loaded = type(pipeline).from_pretrained(tmp_path, safety_checker=None).unet
    assert is_fast(loaded) and torch.equal(predict(loaded), expected)
    dequantized = loaded.dequantize()
    assert not is_fast(loaded)
    assert_near(predict(dequantized), expected, 0.2)


@needs_vnni
@pytest.mark.parametrize("name", ["sd", "pixart"])
def test_masks_of_attention(name):
    fast = packed(name)
    plain = plain_copy(fast)
    everything = predictor(fast)(fast)
    context = "encoder_attention_mask"
    mask = torch.ones(2, 8)
    mask[:, 3:] = 0
    mask[1, 1] = 0
    predict = predictor(fast, **{context: mask})
    found = predict(fast)
    assert plain_blocks(fast) == {}
    assert_near(found, predict(plain))
    assert (found - everything).norm() > 1e-3 * everything.norm()


@needs_vnni
@pytest.mark.parametrize("kind", ["attention_mask", "none"])
def test_a_mask_of_self_attention(kind):
    fast = packed("sd")
    stage = "down_blocks.0.attentions.0.transformer_blocks.0"
    block, plain = fast.get_submodule(stage), plain_copy(fast).get_submodule(stage)
    x, context = torch.randn(3, 6, block.dim), torch.randn(3, 4, 16)
    mask = torch.zeros(3, 1, 6)
    mask[1, :, 2:] = -10000.0
    arguments = {"encoder_hidden_states": context}
    if kind != "none":
        arguments[kind] = mask
    with torch.no_grad():
        assert_near(block(x, **arguments), plain(x, **arguments))


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "pixart"])
def test_bfloat16_models(name):
    """The plain blocks round to bfloat16 between norm, activation and codes, too."""
    float32 = packed(name)
    fast = copy.deepcopy(float32)
    torch.nn.Module.to(fast, torch.bfloat16)  # diffusers' own refuses a quantized model
    plain, errors = plain_copy(fast), []
    for batch in (1, 2, 3, 4):  # one input alone may go either way
        exact = predictor(float32, batch)(float32)
        predict = predictor(fast, batch, torch.bfloat16)
        found = predict(fast)
        assert found.dtype == torch.bfloat16
        errors.append([(y - exact).norm() / exact.norm() for y in (found, predict(plain))])
    ours, theirs = torch.tensor(errors).mean(dim=0)
    assert ours <= 1.1 * theirs < 0.3


def test_float16_models_run_layer_by_layer():
    fast = packed("sd")
    torch.nn.Module.to(fast, torch.float16)
    predict = predictor(fast, dtype=torch.float16)
    assert torch.equal(predict(fast), predict(plain_copy(fast)))


def test_gradients_and_inference_mode_change_nothing():
    fast = packed("sd", TABLES)
    predict = predictor(fast)
    with torch.inference_mode():
        inside = predict(copy.deepcopy(fast))
        first = predict(fast)  # keeps what it lays out
    assert torch.equal(predict(fast), inside.clone()) and torch.equal(first, inside)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator).requires_grad_()
    context = torch.randn(2, 8, 16, generator=generator)
    inputs = {"timestep": 1, "encoder_hidden_states": context}
    with torch.no_grad():
        expected = fast(sample, **inputs)[0]
    assert torch.equal(fast(sample, **inputs)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert_near(fast(sample, **inputs)[0].float(), expected, 0.1)


def test_inputs_are_left_alone():
    for name in ("sd", "dit"):
        fast = packed(name)
        predict = predictor(fast)
        tensors = [c.cell_contents for c in predict.__closure__]
        before = copy.deepcopy(tensors)
        predict(fast)
        predict(fast)
        for one, other in zip(tensors, before, strict=True):
            if isinstance(one, torch.Tensor):
                assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_does_not_reach_the_kernels(dtype):
    fast = packed("sd", TABLES)
    predict = predictor(fast)
    expected = predict(fast)
    other = copy.deepcopy(fast)
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(predict(other), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_default_device_does_not_reach_the_kernels():
    x, rows = torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last), torch.randn(2, 8)

    def all_of_them():
        norm = (x,), None, 4, None, None, 1e-5, "silu", [fused.Output(0, 8, GRID, (1, 1))]
        return [
            fused.encode(x, "none", GRID),
            fused.encode(rows, "none", GRID),
            fused.gated_encode(rows, "gelu", GRID),
            *fused.group_norm_encode(*norm),
            *fused.layer_norm_encode(rows, None, None, 1e-5, None, None, [GRID]),
            *fused.epilogue(GRID, rows[0], None, None, True),
        ]

    expected = all_of_them()
    with torch.device("meta"):
        found = all_of_them()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 12), (0, 5, 12), (2, 0, 12), (2, 0, 3, 12)])
@pytest.mark.parametrize("parts", [(12,), (4, 8)])
def test_nothing_in_a_batch(context, shape, parts):
    layer = IntegerLinear(LayerSpec("linear", 12, 8, 8, 8), parts, 1, context, ("bias",))
    y = layer(torch.empty(shape))
    assert y.shape == (*shape[:-1], 8) and y.dtype == torch.float32


def test_one_time_embedding_for_all_samples():
    fast = packed("sd")
    resnet, plain = (m.down_blocks[0].resnets[0] for m in (fast, plain_copy(fast)))
    x, temb = torch.randn(3, 8, 4, 4), torch.randn(1, resnet.time_emb_proj.in_features)
    with torch.no_grad():
        assert_near(resnet(x, temb), plain(x, temb))
        with pytest.raises(TypeError):  # as diffusers does, not a result without it
            resnet(x, None)


def test_too_few_images_from_the_encoder():
    fast = packed("sd")
    stage = fast.up_blocks[0]
    with pytest.raises(IndexError):
        stage(torch.randn(1, 16, 4, 4), (), torch.randn(1, 32))


def test_parts_of_different_dtypes_are_joined_first():
    fast = packed("sd")
    resnet = fast.up_blocks[0].resnets[0]
    wide = resnet.in_channels // 2
    x, temb = torch.randn(1, wide, 4, 4), torch.randn(1, resnet.time_emb_proj.in_features)
    skip = torch.randn(1, resnet.in_channels - wide, 4, 4).to(torch.bfloat16)
    with torch.no_grad():
        y = resnet.joined((x.to(torch.bfloat16), skip.float()), temb)
        expected = resnet(torch.cat([x.to(torch.bfloat16), skip.float()], dim=1), temb)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernel"), [("sd", "onednn"), ("pixart", "native")])
def test_compiled_its_blocks_take_codes_too(name, kernel, monkeypatch):
    """At 4 bits, which every CPU takes; without VNNI the native product is torch's in float64."""
    absent = Refusal(RefusalCode.MACHINE, "not in this test")
    for name_of, each in registered_kernels().items():
        reason = None if name_of == kernel else absent
        monkeypatch.setattr(each, "why_not", lambda *_, reason=reason: reason)
    fast = packed(name, TABLES, bits=4)
    predict = predictor(fast, timestep=torch.tensor(500).expand(2))
    expected = predict(fast)
    assert plain_blocks(fast) == {} and layers_of(fast)[0].kernel_names() == [kernel]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=counter, fullgraph=True)
    assert_near(predict(compiled), expected)
    assert torch.equal(predict(fast), expected)
    targets = Counter(node.target for graph in counter.graphs for node in graph.graph.nodes)
    # Only the norm before the output layer is left.
    norms = (functional.group_norm, functional.layer_norm, torch.layer_norm, torch.group_norm)
    assert sum(targets[each] for each in norms) == 1
    assert targets[torch.ops.stepquant.layer_norm_encode] > 0
    assert (targets[torch.ops.stepquant.group_norm_encode] > 0) == (name == "sd")
    assert (targets[torch.ops.stepquant.tiled_product] > 0) == (kernel == "native")


@pytest.mark.parametrize("name", ["act_scale", "bias", "step_bias"])
def test_tensors_whose_memory_moves(name):
    """What the native kernels keep of a tensor is where it lies."""
    fast = packed("sd", TABLES)
    predict = predictor(fast)
    before = predict(fast)
    for layer in layers_of(fast):
        tensor = getattr(layer, name)
        if tensor is not None:
            tensor.share_memory_()
    assert torch.equal(predict(fast), before)
    for layer in layers_of(fast):
        if name != "act_scale" and getattr(layer, name) is not None:
            getattr(layer, name).data = getattr(layer, name).clone()
    assert torch.equal(predict(fast), before)
