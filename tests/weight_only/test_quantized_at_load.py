"""Float models that are quantized while diffusers and transformers load them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn

from architectures import ARCHITECTURES, build
from quantize_runs import refused, tree
from stepquant.api import DynamicConfig, WeightOnlyConfig, inspect, quantize, sample
from stepquant.checkpoint.config import StepQuantConfig
from stepquant.runtime.layers.dynamic import Dynamic
from stepquant.runtime.layers.weight_only import WeightOnly, weight_only_in_place_of

CONFIGS = {
    "weight-only": WeightOnlyConfig,
    "weight-only-4": partial(WeightOnlyConfig, bits=4),
    "dynamic": DynamicConfig,
}
STEPS = 2

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Float pipelines by name."""
    folder = tmp_path_factory.mktemp("float")
    for name in ("sd", "sd3"):
        pipeline = build(name)
        pipeline.save_pretrained(folder / name)
    return folder


def load(folder, **configs):
    mapping = PipelineQuantizationConfig(quant_mapping=configs)
    pipeline = DiffusionPipeline.from_pretrained(folder, quantization_config=mapping)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(name, pipeline):
    return sample(pipeline, 1, STEPS, **ARCHITECTURES[name].arguments)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_every_layer_of_the_components_is_quantized_and_images_are_near(folders, name, kind):
    component, config = ARCHITECTURES[name].component, CONFIGS[kind]()
    pipeline = load(folders / name, **{component: config, "vae": config, "text_encoder": config})
    for part in (component, "vae", "text_encoder"):
        model = getattr(pipeline, part)
        found = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert found and all(isinstance(layer, WeightOnly) for layer in found)
        assert all(isinstance(layer, Dynamic) == (kind == "dynamic") for layer in found)
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
    wanted = draw(name, build(name))
    images = draw(name, pipeline)
    assert not torch.equal(images, wanted)
    assert float((images - wanted).abs().mean()) < 0.05
    assert config.layers is None  # the caller's serves all components


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_what_rounding_the_float_weights_gives(folders, kind):
    config = CONFIGS[kind]()
    loaded = load(folders / "sd", unet=config).unet
    for name, layer in build("sd").unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            wanted = weight_only_in_place_of(
                layer, bits=config.bits, kinds=config.kinds
            ).state_dict()
            found = loaded.get_submodule(name).state_dict()
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_saves_and_loads_bit_for_bit_without_a_config(folders, tmp_path, kind):
    config = CONFIGS[kind]()
    pipeline = load(folders / "sd", unet=config, text_encoder=config)
    pipeline.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    layers = [m for m in again.unet.modules() if isinstance(m, WeightOnly)]
    assert layers and all(isinstance(m, Dynamic) == (kind == "dynamic") for m in layers)
    assert torch.equal(draw("sd", again), draw("sd", pipeline))
    again.save_pretrained(tmp_path / "twice")
    once, twice = tree(tmp_path / "saved" / "unet"), tree(tmp_path / "twice" / "unet")
    name = "diffusion_pytorch_model.safetensors"
    assert once[name] == twice[name]
    size = sum(len(content) for key, content in once.items() if key.endswith(".safetensors"))
    whole = (folders / "sd" / "unet" / name).stat().st_size
    assert size < 0.5 * whole


def test_only_the_named_layers_are_quantized(folders):
    unet = load(folders / "sd", unet=DynamicConfig(["conv_in"])).unet
    names = [name for name, module in unet.named_modules() if isinstance(module, WeightOnly)]
    assert names == ["conv_in"]
    message = refused(lambda: load(folders / "sd", unet=DynamicConfig(["absent"])))
    assert "names the layer 'absent', which is nothing in UNet2DConditionModel" in message


def test_grids_of_few_bits_are_named_and_those_that_need_a_search_are_refused(folders):
    unet = load(folders / "sd", unet=WeightOnlyConfig(bits=4)).unet
    assert unet.hf_quantizer.quantization_config.grids == "minmax"
    for bits in (4, 8):
        searched = WeightOnlyConfig(bits=bits, grids="mse")
        message = refused(lambda searched=searched: load(folders / "sd", unet=searched))
        assert "grids of a WeightOnlyConfig for a float model is 'mse': expected 'min" in message
    assert "bits of a DynamicConfig is 4: expected 8" in refused(lambda: DynamicConfig(bits=4))


def test_a_calibrated_recipe_points_to_quantize(folders):
    message = refused(lambda: load(folders / "sd", unet=StepQuantConfig()))
    assert "StepQuantConfig was given for a float model" in message
    assert "stepquant quantize MODEL" in message and "WeightOnlyConfig or DynamicConfig" in message


def test_a_denoiser_that_is_quantized_already_is_not_calibrated(folders):
    pipeline = load(folders / "sd", unet=DynamicConfig())
    arguments = ARCHITECTURES["sd"].arguments
    message = refused(lambda: quantize(pipeline, "minmax", steps=STEPS, **arguments))
    assert "is quantized already: expected a float model" in message
    record = inspect(pipeline, num=1, steps=STEPS, **arguments)
    assert record["kind"] == "dynamic" and {row["weight_bits"] for row in record["layers"]} == {8}


@torch.no_grad()
def test_a_half_precision_load_computes_in_it(folders):
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": DynamicConfig()})
    unet = DiffusionPipeline.from_pretrained(
        folders / "sd", quantization_config=mapping, dtype=torch.bfloat16
    ).unet
    assert unet.dtype == torch.bfloat16
    assert unet.conv_in.weight_scale.dtype == torch.float32
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 8, 16)
    y = unet(x.bfloat16(), 10, text.bfloat16()).sample
    wanted = build("sd").unet(x, 10, text).sample
    assert float((y.float() - wanted).square().mean() / wanted.square().mean()) < 0.01
