"""Casts of quantized models, as pipelines and users make them.

Varied: integer, weight-only and dynamic models, and a weight-only text encoder; `.to` with a dtype
alone, with a device, with keywords, `.float` and `.half`, of models, of pipelines and of copies;
`from_pipe`; the VAE of Stable Diffusion XL in float16.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    PipelineQuantizationConfig,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)

from architectures import ARCHITECTURES, build
from quantize_runs import FAST_MINMAX
from stepquant.api import DynamicConfig, WeightOnlyConfig, quantize
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.weight_only.quantizers import quantize_weights

CONFIGS = {"weight-only": WeightOnlyConfig, "dynamic": DynamicConfig}
KINDS = ["integer", *CONFIGS]
CALL = {"num_inference_steps": 2, "output_type": "pt"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("casts")
    build("sd").save_pretrained(folder / "float")
    arguments = {"steps": 2, "settings": FAST_MINMAX, **ARCHITECTURES["sd"].arguments}
    components = {"vae": "w8", "text_encoder": "w8"}
    out = folder / "integer"
    quantize(build("sd"), "minmax", 8, 8, out=out, components=components, **arguments)
    return folder


def load(folders, kind, **arguments):
    if kind in CONFIGS:
        config = CONFIGS[kind]()
        arguments["quantization_config"] = PipelineQuantizationConfig(
            quant_mapping={"unet": config, "vae": config, "text_encoder": config}
        )
        kind = "float"
    pipeline = DiffusionPipeline.from_pretrained(folders / kind, **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **more):
    return pipeline("a", generator=torch.Generator().manual_seed(0), **CALL, **more).images


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_to_the_own_dtype_is_no_cast(folders, kind):
    pipeline = load(folders, kind)
    wanted = draw(pipeline)
    for ways in (
        lambda it: it.to(torch.float32),
        lambda it: it.to("cpu", torch.float32),
        lambda it: it.to(dtype=torch.float32),
        lambda it: it.to(device="cpu", dtype=torch.float32),
    ):
        assert ways(pipeline) is pipeline
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            assert ways(part) is part and part.float() is part
    for copied in (copy.deepcopy(pipeline.unet), pickle.loads(pickle.dumps(pipeline.unet))):
        assert copied.to(torch.float32) is copied
    assert torch.equal(draw(pipeline), wanted)


def test_an_integer_model_is_not_cast_to_another_dtype(folders):
    unet = load(folders, "integer").unet
    for cast in (lambda: unet.to(torch.bfloat16), unet.half):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    assert unet.dtype == torch.float32
    half = load(folders, "integer", dtype=torch.bfloat16).unet
    assert half.to(torch.bfloat16) is half
    with pytest.raises(ValueError, match="quantized model"):
        half.float()


@torch.no_grad()
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_dequantized_on_use_follow_a_cast(folders, kind, part):
    """The result is that of loading in the other dtype; codes and scales stay as they are."""
    model, wanted = (getattr(load(folders, kind, dtype=d), part) for d in (None, torch.bfloat16))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert model.to(torch.bfloat16) is model and model.dtype == torch.bfloat16
    layers = {n: m for n, m in model.named_modules() if isinstance(m, WeightOnly)}
    for name, layer in layers.items():
        assert layer.weight_scale.dtype == torch.float32
        assert torch.equal(layer.weight, before[f"{name}.weight"])
        assert torch.equal(layer.weight_scale, before[f"{name}.weight_scale"])
    found = model.state_dict()
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        name: tensor.dtype for name, tensor in wanted.state_dict().items()
    }
    assert model.float().dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_another_pipeline_is_made_of_the_components(folders, kind):
    pipeline = load(folders, kind)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    arguments = {"image": image, "strength": 1.0}
    wanted = draw(StableDiffusionImg2ImgPipeline(**load(folders, kind).components), **arguments)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    assert torch.equal(draw(other, **arguments), wanted)


def test_the_vae_of_sdxl_in_float16_is_cast_up_and_back():
    """The control is the float model's VAE with the same rounded weights."""
    pipeline = build("sdxl")
    quantize_weights(pipeline.vae, "the VAE")
    pipeline.vae.to(torch.float16)
    assert pipeline.vae.config.force_upcast
    other = build("sdxl")
    for name, layer in pipeline.vae.named_modules():
        if isinstance(layer, WeightOnly):
            other.vae.get_submodule(name).weight.data = layer.float_weight(torch.float32)
    other.vae.to(torch.float16)
    for each in (pipeline, other):
        each.set_progress_bar_config(disable=True)
    images, wanted = draw(pipeline), draw(other)
    assert pipeline.vae.dtype == torch.float16
    torch.testing.assert_close(images, wanted, rtol=0, atol=2e-3)
    StableDiffusionXLImg2ImgPipeline.from_pipe(pipeline)
    assert pipeline.vae.dtype == torch.float32  # as from_pipe asks, of float models too
