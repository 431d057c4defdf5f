"""Float models that are quantized while diffusers and transformers load them."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn

from architectures import ARCHITECTURES, build, wan_transformer
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


@pytest.mark.parametrize("kind", CONFIGS)
def test_modules_to_not_convert_stay_float(folders, tmp_path, kind):
    config = CONFIGS[kind](modules_to_not_convert=["mid_block", "time_embedding.linear_?"])
    pipeline = load(folders / "sd", unet=config)
    unet = pipeline.unet
    names = {name for name, module in unet.named_modules() if isinstance(module, WeightOnly)}
    assert names and not [n for n in names if n.startswith(("mid_block", "time_embedding"))]
    resolved = unet.hf_quantizer.quantization_config
    assert {"mid_block.resnets.0.conv1", "time_embedding.linear_1"} <= set(resolved.float_layers)
    pipeline.save_pretrained(tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved").unet
    assert {n for n, m in again.named_modules() if isinstance(m, WeightOnly)} == names


def test_modules_that_are_not_there_are_warned_of(folders):
    with pytest.warns(UserWarning, match="'encoder', which names no module of UNet2DCondition"):
        load(folders / "sd", unet=WeightOnlyConfig(modules_to_not_convert=["encoder"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_must_stay_float_does_so_by_itself_and_is_listed(tmp_path, kind, dtype):
    """Wan keeps modules in float32, and has a convolution in three dimensions."""
    model = wan_transformer()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(
        tmp_path, quantization_config=CONFIGS[kind](), torch_dtype=dtype
    )
    listed = loaded.hf_quantizer.quantization_config.float_layers
    assert listed["patch_embedding"] == "layer of the class Conv3d"
    embedder = loaded.condition_embedder.time_embedder
    assert embedder.linear_1.weight.dtype == embedder.linear_2.weight.dtype == torch.float32
    assert "condition_embedder.time_embedder.linear_1" in listed
    x, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 6, 16)
    with torch.no_grad():
        wanted = model(x, torch.tensor([5]), text, return_dict=False)[0]
        found = loaded(x.to(dtype), torch.tensor([5]), text.to(dtype), return_dict=False)[0]
    assert found.dtype == dtype
    bound = 0.15 if kind == "weight-only-4" else 0.02
    assert float((found - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("make", [partial(nn.Linear, 6, 4), partial(nn.Conv2d, 6, 4, 1)])
def test_a_float32_activation_may_reach_a_layer_of_half_precision(kind, dtype, make):
    layer = make().to(dtype)
    config = CONFIGS[kind]()
    packed = weight_only_in_place_of(layer, bits=config.bits, kinds=config.kinds)
    x = torch.randn(2, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 3, 3)
    wanted = layer.float()(x)
    found = packed(input=x)
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 0.15


@pytest.mark.parametrize("config", [WeightOnlyConfig(["a"]), DynamicConfig(), StepQuantConfig()])
def test_a_config_is_printed_as_those_of_diffusers(config):
    name, _, text = str(config).partition(" ")
    assert name == type(config).__name__ and json.loads(text) == config.to_dict()
    assert "\n" not in repr(config)  # a denoiser has hundreds of layers
