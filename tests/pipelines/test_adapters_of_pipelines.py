"""ControlNet, T2I-Adapter and IP-Adapter on quantized denoisers.

Varied: integer, weight-only and dynamic denoisers; adapter on, at scale 0 and unloaded; put on a
denoiser that was quantized without it, or calibrated with it. The control is the float pipeline.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from architectures import ARCHITECTURES, WIDTH, build
from quantize_runs import FAST_MINMAX, refused
from stepquant.api import DynamicConfig, WeightOnlyConfig, load, quantize, sample

CONFIGS = {"weight-only": WeightOnlyConfig, "dynamic": DynamicConfig}
KINDS = ["integer", *CONFIGS]
PICTURE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
ADAPTED = {"image": PICTURE, "adapter_conditioning_scale": 3.0}
PIL_PICTURE = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Pipelines by kind, made anew by each call."""
    folder = tmp_path_factory.mktemp("adapters")
    build("sd").save_pretrained(folder / "float")
    arguments = {"steps": 2, "settings": FAST_MINMAX, **ARCHITECTURES["sd"].arguments}
    quantize(build("sd"), "minmax", 8, 8, out=folder / "integer", **arguments)

    def make(kind):
        if kind not in CONFIGS:
            return load(folder / kind)
        config = PipelineQuantizationConfig(quant_mapping={"unet": CONFIGS[kind]()})
        return DiffusionPipeline.from_pretrained(folder / "float", quantization_config=config)

    return make


def parts(pipeline):
    return {**pipeline.components, "requires_safety_checker": False}


def with_controlnet(pipeline):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ControlNetModel.from_unet(
            build("sd").unet, conditioning_embedding_out_channels=(8, 8)
        ).eval()
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            nn.init.normal_(layer.weight, std=0.3)  # which starts at zero
    return StableDiffusionControlNetPipeline(controlnet=net, **parts(pipeline))


def with_t2i_adapter(pipeline):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        adapter = T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2).eval()
    components = {key: part for key, part in parts(pipeline).items() if key != "image_encoder"}
    return StableDiffusionAdapterPipeline(adapter=adapter, **components)


def ip_adapter(unet):
    generator = torch.Generator().manual_seed(3)

    def random(*size):
        return torch.randn(size, generator=generator)

    crossing = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    widths = [unet.get_submodule(name.removesuffix(".processor")).inner_dim for name in crossing]
    weights = {
        f"{2 * index + 1}.{key}.weight": random(width, WIDTH)
        for index, width in enumerate(widths)
        for key in ("to_k_ip", "to_v_ip")
    }
    norm = {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    projection = {"proj.weight": random(4 * WIDTH, WIDTH), "proj.bias": torch.zeros(4 * WIDTH)}
    return {"image_proj": {**projection, **norm}, "ip_adapter": weights}


def with_image_encoder(pipeline):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                projection_dim=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            )
        ).eval()
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    given = {"image_encoder": encoder, "feature_extractor": CLIPImageProcessor(**size)}
    return StableDiffusionPipeline(**{**parts(pipeline), **given})


def draw(pipeline, **more):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline("a", num_inference_steps=2, output_type="np", generator=generator, **more)
    return torch.as_tensor(images[0])


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("attach", "call", "scale"),
    [
        (with_controlnet, {"image": PICTURE}, "controlnet_conditioning_scale"),
        (with_t2i_adapter, ADAPTED, "adapter_conditioning_scale"),
    ],
    ids=["controlnet", "t2i-adapter"],
)
def test_a_quantized_denoiser_follows_the_residuals_as_the_float_one(
    pipelines, kind, attach, call, scale
):
    control, quantized = attach(build("sd")), attach(pipelines(kind))
    wanted, found = draw(control, **call), draw(quantized, **call)
    effect = distance(wanted, draw(control, **{**call, scale: 0.0}))
    assert effect > 0.08 and distance(found, wanted) < 0.5 * effect
    without = draw(quantized, **{**call, scale: 0.0})
    torch.testing.assert_close(without, draw(pipelines(kind)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("attach", "call"),
    [(with_controlnet, {"image": PICTURE}), (with_t2i_adapter, ADAPTED)],
    ids=["controlnet", "t2i-adapter"],
)
def test_a_pipeline_with_residuals_is_calibrated(tmp_path, attach, call):
    """One picture for each prompt: the float pipeline of T2I-Adapter takes no other batch."""
    prompts = ["a", "fog"]
    call = {**call, "image": [Image.fromarray(np.full((16, 16, 3), c, np.uint8)) for c in (9, 99)]}
    out = tmp_path / "out"
    arguments = {"steps": 2, "prompts": prompts, "call": call}
    result = quantize(attach(build("sd")), "training-free", 8, 8, out=out, **arguments)
    found = sample(result.pipeline, 2, **arguments)
    wanted = sample(attach(build("sd")), 2, **arguments)
    assert distance(found, wanted) < 0.05
    assert torch.equal(sample(load(out), 2, **arguments), found)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ip_adapter_is_loaded_and_unloaded(pipelines, kind):
    control, quantized = (with_image_encoder(each) for each in (build("sd"), pipelines(kind)))
    weights, without = ip_adapter(control.unet), draw(quantized)
    for each in (control, quantized):
        each.load_ip_adapter(copy.deepcopy(weights), subfolder="", weight_name="it.bin")
        each.set_ip_adapter_scale(0.3)
    call = {"ip_adapter_image": PIL_PICTURE}
    wanted, found = draw(control, **call), draw(quantized, **call)
    effect = distance(wanted, draw(build("sd")))
    assert effect > 0.08 and distance(found, wanted) < 0.7 * effect
    quantized.unload_ip_adapter()
    assert torch.equal(draw(quantized), without)


def test_a_pipeline_with_an_ip_adapter_is_not_quantized(tmp_path):
    pipeline = with_image_encoder(build("sd"))
    pipeline.load_ip_adapter(ip_adapter(pipeline.unet), subfolder="", weight_name="it.bin")
    arguments = {"call": {"ip_adapter_image": PIL_PICTURE}, "settings": FAST_MINMAX}
    message = refused(
        lambda: quantize(
            pipeline, "minmax", steps=2, prompts="a", out=tmp_path / "out", **arguments
        )
    )
    assert "to_k_ip" in message and "expected a model as from_config builds it" in message
