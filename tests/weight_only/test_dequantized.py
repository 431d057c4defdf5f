"""`dequantize()` of weight-only and dynamic models, as diffusers' other quantizers have it.

Varied: the way of quantizing (while loading, streamed, in memory), bits, kind of model (denoiser,
VAE, text encoder), dtype, saving and loading, casting and quantizing again, offloading, LoRA. The
control computes the rounded weights in float layers.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from architectures import build
from lora_files import matrices, of
from quantize_runs import refused
from stepquant.api import DynamicConfig, WeightOnlyConfig, load_lora, quantize, unload_lora
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.weight_only.quantizers import quantize_weights

CONFIGS = {
    "w8": WeightOnlyConfig,
    "w4": partial(WeightOnlyConfig, bits=4),
    "dynamic": DynamicConfig,
}
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dequantized") / "float"
    build("sd").save_pretrained(folder)
    return folder


def load(folder, part, **arguments):
    return KINDS[part].from_pretrained(folder, subfolder=part, **arguments)


@torch.no_grad()
def run(model):
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, CLIPTextModel):
        return model(torch.tensor([[0, 5, 9, 1]])).last_hidden_state
    if isinstance(model, AutoencoderKL):
        x = torch.randn(1, 3, 8, 8, generator=generator).to(model.dtype)
        return model(x, sample_posterior=False).sample
    x, text = (torch.randn(shape, generator=generator) for shape in [(2, 4, 8, 8), (2, 8, 16)])
    return model(x.to(model.dtype), 10, text.to(model.dtype)).sample


def rounded(model, quantized):
    """The float `model` with the rounded weights of `quantized`."""
    for name, layer in quantized.named_modules():
        if isinstance(layer, WeightOnly):
            own = model.get_submodule(name)
            own.weight.data = layer.float_weight(own.weight.dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("part", KINDS)
def test_it_is_the_float_model_with_the_rounded_weights(folder, tmp_path, part, config, dtype):
    quantized = load(folder, part, dtype=dtype, quantization_config=CONFIGS[config]())
    wanted = rounded(load(folder, part, dtype=dtype), quantized)
    model = copy.deepcopy(quantized).dequantize()
    assert torch.equal(run(model), run(wanted))
    if config != "dynamic":
        assert torch.equal(run(model), run(quantized))
    assert {n: (t.dtype, t.shape) for n, t in model.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in wanted.state_dict().items()
    }
    assert [type(m) for m in model.modules()] == [type(m) for m in wanted.modules()]
    assert model.num_parameters() == wanted.num_parameters()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(run(KINDS[part].from_pretrained(tmp_path, dtype=dtype)), run(wanted))


@pytest.mark.parametrize("part", KINDS)
def test_it_is_cast_trained_and_quantized_again_like_any_float_model(folder, part):
    model = load(folder, part, quantization_config=WeightOnlyConfig()).dequantize()
    assert run(model.to(torch.bfloat16)).dtype == torch.bfloat16
    assert run(model.float()).dtype == torch.float32
    assert all(layer.weight.requires_grad for layer in model.modules() if type(layer) is nn.Linear)
    quantize_weights(model, "it")
    assert [layer for layer in model.modules() if isinstance(layer, WeightOnly)]


def test_a_text_encoder_takes_the_dtype(folder):
    model = load(folder, "text_encoder", quantization_config=WeightOnlyConfig())
    assert model.dequantize(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


def test_a_streamed_model_is_dequantized(folder, tmp_path):
    pipeline = quantize(folder, "weight-only", out=tmp_path / "w4").pipeline
    before = run(pipeline.unet)
    assert torch.equal(run(pipeline.unet.dequantize()), before)


def test_a_model_quantized_in_memory_is_dequantized():
    model = build("sd").vae
    quantize_weights(model, "the VAE")
    before = run(model)
    assert torch.equal(run(model.dequantize()), before)


@pytest.mark.parametrize("part", KINDS)
def test_an_offloaded_model_is_refused(folder, part):
    model = load(folder, part, quantization_config=WeightOnlyConfig())
    cpu_offload(model, torch.device("cpu"))
    assert "is offloaded: expected all tensors in memory" in refused(model.dequantize)


def test_a_model_placed_by_a_device_map_is_dequantized(folder):
    places = {name: "cpu" for name, _ in load(folder, "unet").named_children()}
    model = load(folder, "unet", device_map=places, quantization_config=WeightOnlyConfig())
    before = run(model)
    model.dequantize()
    assert torch.equal(run(model), before)
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.weight.data.zero_()
    assert not torch.equal(run(model), before)  # not the old layers' result


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_model_with_a_lora_is_refused(folder, part):
    pipeline = build("sd")
    names = [n for n, m in getattr(pipeline, part).named_modules() if isinstance(m, nn.Linear)]
    tensors = of(part, matrices(getattr(pipeline, part), [n for n in names if "attn" in n][:2]))
    model = load(folder, part, quantization_config=WeightOnlyConfig())
    setattr(pipeline, part, model)
    load_lora(pipeline, tensors, name="style")
    assert "branch of the LoRA 'style'" in refused(model.dequantize)
    unload_lora(pipeline)
    model.dequantize()
