"""LoRAs on quantized pipelines, against the float model with the same LoRA merged."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from architectures import ARCHITECTURES, build, session
from lora_files import matrices, merge, of
from plain_denoiser import SHAPE, denoiser
from quantize_runs import refused, tree
from stepquant import methods
from stepquant.api import (
    DenoiserPipeline,
    RecordedDenoiser,
    load_lora,
    lora_scales,
    quantize,
    sample,
    set_lora_scales,
    unload_lora,
)
from stepquant.calibration.trajectories import predict
from stepquant.checkpoint.save import save_pipeline
from stepquant.methods.recipe import Recipe

STEPS = 3
FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = {
    "sd": [
        f"{BLOCK}.attn1.to_q",
        f"{BLOCK}.attn1.to_v",
        f"{BLOCK}.attn2.to_k",
        f"{BLOCK}.attn2.to_out.0",
        f"{BLOCK}.ff.net.0.proj",
        "down_blocks.0.attentions.0.proj_in",
        "up_blocks.1.resnets.0.conv1",  # reads a concatenation
        "down_blocks.0.downsamplers.0.conv",
    ],
    "sdxl": [
        "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "add_embedding.linear_1",
        "conv_in",
    ],
    "dit": ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.norm1.linear"],
    "pixart": ["transformer_blocks.0.attn2.to_k", "proj_out"],
    "sd3": ["transformer_blocks.0.attn.add_v_proj", "transformer_blocks.1.ff.net.2"],
    "flux": ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"],
}
TEXT = "encoder.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.usefixtures("one_thread")


def packed(name, recipe="minmax", out=None, **settings):
    arguments = ARCHITECTURES[name].arguments
    return quantize(build(name), recipe, 8, 8, out, STEPS, {**FEW, **settings}, **arguments)


def draw(name, pipeline):
    return sample(pipeline, 2, STEPS, **ARCHITECTURES[name].arguments)


def distance(a, b):
    return float((a - b).square().mean() / b.square().mean())


@pytest.fixture
def sd():
    return packed("sd").pipeline


@pytest.fixture
def lora():
    return matrices(build("sd").unet, LAYERS["sd"])


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_the_packed_model_with_a_lora_is_near_the_float_model_with_it_merged(name):
    component, data = ARCHITECTURES[name].component, session(name).trajectories
    model = getattr(build(name), component)
    tensors = matrices(model, LAYERS[name])
    pipeline = packed(name).pipeline
    without = predict(getattr(pipeline, component), data)
    loaded = load_lora(pipeline, of(component, tensors), 1.5)
    assert loaded == [f"{component}.{layer}" for layer in LAYERS[name]]
    found = predict(getattr(pipeline, component), data)
    wanted = predict(merge(model, tensors, 1.5), data)
    assert distance(found, wanted) < 0.02
    assert distance(without, wanted) > 5 * distance(found, wanted)
    assert unload_lora(pipeline) == ["default"]
    assert torch.equal(predict(getattr(pipeline, component), data), without)


@torch.no_grad()
def test_each_layer_gains_the_product_of_its_matrices(sd, lora):
    """In the whole model, where packed layers read split and scaled inputs."""
    data, seen = session("sd").trajectories, {}

    def keep(name):
        return lambda module, inputs, y: seen.update({name: (inputs[0], y)})

    bare = copy.deepcopy(sd.unet)
    load_lora(sd, of("unet", lora), 0.5)
    for name in LAYERS["sd"]:
        sd.unet.get_submodule(name).register_forward_hook(keep(name))
    predict(sd.unet, data)
    for name in LAYERS["sd"]:
        x, y = seen[name]
        layer = bare.get_submodule(name)
        layer.context.rows = sd.unet.get_submodule(name).context.rows
        layer.backend = sd.unet.get_submodule(name).backend
        A, B = (lora[f"{name}.lora_{which}.weight"] for which in "AB")
        if A.dim() == 2:
            wanted = 0.5 * (x.double() @ A.double().T @ B.double().T)
        else:
            spec = layer.spec
            hidden = torch.nn.functional.conv2d(
                x.double(), A.double(), None, spec.stride, spec.padding
            )
            wanted = 0.5 * torch.nn.functional.conv2d(hidden, B.double())
        gained = (y - layer(x)).double()
        torch.testing.assert_close(gained, wanted, rtol=1e-4, atol=1e-5)


def test_unloaded_it_draws_the_same_images_and_loaded_it_saves_the_same_bytes(lora, tmp_path):
    pipeline = packed("sd", out=tmp_path / "plain").pipeline
    before = draw("sd", pipeline)
    file = tmp_path / "style.safetensors"
    save_file(of("unet", lora) | of("text_encoder", text_matrices(pipeline)), file)
    load_lora(pipeline, file, 2.0)
    assert not torch.allclose(draw("sd", pipeline), before, atol=1e-3)
    save_pipeline(pipeline, "unet", tmp_path / "loaded")
    assert tree(tmp_path / "loaded") == tree(tmp_path / "plain")
    unload_lora(pipeline)
    assert torch.equal(draw("sd", pipeline), before)

    loaded = DiffusionPipeline.from_pretrained(tmp_path / "plain")
    loaded.set_progress_bar_config(disable=True)
    load_lora(loaded, file, 2.0)
    load_lora(pipeline, file, 2.0)
    assert torch.equal(draw("sd", loaded), draw("sd", pipeline))


def text_matrices(pipeline):
    return matrices(pipeline.text_encoder, [TEXT])


def test_text_encoders_are_served_too(sd):
    layer = sd.text_encoder.get_submodule(TEXT)
    x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(0))
    tensors, before = text_matrices(sd), layer(x)
    images = draw("sd", sd)
    assert load_lora(sd, of("text_encoder", tensors), 3.0) == [f"text_encoder.{TEXT}"]
    A, B = tensors.values()
    torch.testing.assert_close(layer(x) - before, 3 * x @ A.T @ B.T, rtol=1e-4, atol=1e-5)
    assert not torch.equal(draw("sd", sd), images)
    unload_lora(sd)
    assert torch.equal(layer(x), before) and torch.equal(draw("sd", sd), images)


@torch.no_grad()
def test_several_loras_each_with_a_scale(sd, lora):
    data = session("sd").trajectories
    half = dict(list(lora.items())[:4])
    without = predict(sd.unet, data)
    load_lora(sd, of("unet", lora), 1.0, "style")
    alone = predict(sd.unet, data)
    load_lora(sd, of("unet", half), -0.5, "person")
    assert lora_scales(sd) == {"style": 1.0, "person": -0.5}
    both = predict(sd.unet, data)
    assert not torch.equal(both, alone)
    set_lora_scales(sd, {"person": 0})
    assert torch.equal(predict(sd.unet, data), alone)
    set_lora_scales(sd, {"person": -0.5})
    assert torch.equal(predict(sd.unet, data), both)
    merged = merge(merge(build("sd").unet, lora, 1.0), half, -0.5)
    assert distance(both, predict(merged, data)) < 0.02
    assert unload_lora(sd, "person") == ["person"]
    assert torch.equal(predict(sd.unet, data), alone)
    assert unload_lora(sd) == ["style"]
    assert torch.equal(predict(sd.unet, data), without)
    assert unload_lora(sd) == [] and lora_scales(sd) == {}


SCALING = ["smoothing", "weight_dilation"]


def scaled(step, fold):
    recipe = Recipe(name="scaled", description="One scaling.", steps=(methods.STEPS[step](),))
    return packed("sd", recipe, **{f"{step}.fold": fold}).pipeline


@pytest.mark.parametrize("step", SCALING)
@torch.no_grad()
def test_a_lora_fits_where_scalings_are_not_folded(step, lora):
    """The layers read what those of the float model read, so its LoRA does the same."""
    data, pipeline = session("sd").trajectories, scaled(step, fold=False)
    load_lora(pipeline, of("unet", lora))
    wanted = predict(merge(build("sd").unet, lora, 1.0), data)
    assert distance(predict(pipeline.unet, data), wanted) < 0.02


def test_whether_a_step_of_another_package_has_folded_is_read_from_the_recipe(lora):
    pipeline = scaled("smoothing", fold=False)
    recipe = pipeline.unet.hf_quantizer.quantization_config.recipe
    for settings, fits in (({"fold": False}, True), ({}, True), ({"fold": True}, False)):
        recipe["steps"] = [{"not_installed": settings}]
        if fits:
            load_lora(pipeline, of("unet", lora))
            unload_lora(pipeline)
        else:
            message = refused(lambda: load_lora(pipeline, of("unet", lora)))
            assert "--set not_installed.fold=false" in message


@pytest.mark.parametrize("step", SCALING)
@torch.no_grad()
def test_a_lora_of_layers_with_folded_scalings_is_refused_by_name(step, lora):
    data, pipeline = session("sd").trajectories, scaled(step, fold=True)
    before = predict(pipeline.unet, data)
    message = refused(lambda: load_lora(pipeline, of("unet", lora)))
    assert f"{BLOCK}.attn1.to_q" in message and f"--set {step}.fold=false" in message
    assert torch.equal(predict(pipeline.unet, data), before)
    untouched = {key: value for key, value in lora.items() if "attn2.to_k" in key or "conv" in key}
    assert len(load_lora(pipeline, of("unet", untouched))) == 3


def test_a_lora_for_layers_that_the_model_does_not_have(sd, lora):
    wrong = {key.replace("attn1", "attn7"): value for key, value in lora.items()}
    message = refused(lambda: load_lora(sd, of("unet", wrong)))
    assert f"unet.{BLOCK}.attn7.to_q.lora_A.weight" in message
    assert f"UNet2DConditionModel has no layer '{BLOCK}.attn7.to_q'" in message
    assert "such as 'conv_in'" in message and lora_scales(sd) == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "a.b"}, "the name of a LoRA is 'a.b'"),
        ({"scale": float("nan")}, "the scale of a LoRA is nan"),
        ({"scale": True}, "the scale of a LoRA is True"),
        ({"scale": "1"}, "the scale of a LoRA is '1'"),
        ({"source": "absent.safetensors"}, "'absent.safetensors' does not exist"),
    ],
)
def test_bad_arguments_are_told(sd, lora, change, words):
    assert words in refused(lambda: load_lora(sd, **{"source": of("unet", lora), **change}))
    assert lora_scales(sd) == {}


def test_names_that_are_taken_or_not_there(sd, lora):
    load_lora(sd, of("unet", lora), name="style")
    message = refused(lambda: load_lora(sd, of("unet", lora), name="style"))
    assert "a LoRA called 'style' is loaded already" in message
    for act in (lambda: unload_lora(sd, "other"), lambda: set_lora_scales(sd, {"other": 1.0})):
        assert "no LoRA called 'other' is loaded: expected one of style" in refused(act)
    assert "the scale of a LoRA is inf" in refused(
        lambda: set_lora_scales(sd, {"style": float("inf")})
    )


@torch.no_grad()
def test_a_module_of_ones_own_and_its_float_layers():
    """No names to convert, and layers that stayed float: those get the same."""
    net = denoiser()
    pipeline = DenoiserPipeline(net, SHAPE, float_layers=["time.*"])
    result = quantize(pipeline, "minmax", 8, 8, None, STEPS, FEW).pipeline
    layers = ["time.0", "body.1.qkv", "body.2.conv"]
    tensors = matrices(net, layers)
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor(700)
    without = result.denoiser(x, t)
    assert load_lora(result, tensors) == [f"denoiser.{name}" for name in layers]
    found, wanted = result.denoiser(x, t), merge(copy.deepcopy(net), tensors, 1.0)(x, t)
    assert 5 * distance(found, wanted) < distance(without, wanted)
    unload_lora(result)
    assert torch.equal(result.denoiser(x, t), without)


@torch.no_grad()
def test_a_float_pipeline_takes_one_too(lora):
    """So that a quantized model is compared with its float one under the same LoRA."""
    data, pipeline = session("sd").trajectories, build("sd")
    without = predict(pipeline.unet, data)
    load_lora(pipeline, of("unet", lora), 1.5)
    wanted = predict(merge(build("sd").unet, lora, 1.5), data)
    torch.testing.assert_close(predict(pipeline.unet, data), wanted, rtol=1e-3, atol=1e-4)
    unload_lora(pipeline)
    assert torch.equal(predict(pipeline.unet, data), without)


def test_a_pipeline_with_a_lora_is_not_quantized(lora):
    """It would be calibrated with the LoRA and packed without."""
    pipeline = build("sd")
    load_lora(pipeline, of("unet", lora), name="style")
    arguments = ARCHITECTURES["sd"].arguments
    message = refused(lambda: quantize(pipeline, "minmax", steps=2, **arguments))
    assert "has the LoRA 'style' loaded" in message and "unload_lora" in message


def test_a_model_with_a_lora_is_not_dequantized(sd, lora):
    load_lora(sd, of("unet", lora), name="style")
    assert "branch of the LoRA 'style'" in refused(lambda: sd.unet.dequantize())
    unload_lora(sd)
    sd.unet.dequantize()


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_denoiser_takes_one_and_lets_it_go(sd, lora):
    data = session("sd").trajectories
    without = predict(sd.unet, data)
    load_lora(sd, of("unet", lora))
    wanted = predict(sd.unet, data)
    unload_lora(sd)
    sd.unet.compile(backend="eager")
    torch.testing.assert_close(predict(sd.unet, data), without, rtol=1e-3, atol=1e-3)
    load_lora(sd, of("unet", lora))
    found = predict(sd.unet, data)
    assert distance(found, wanted) < 1e-3 < distance(found, without)
    unload_lora(sd)
    torch.testing.assert_close(predict(sd.unet, data), without, rtol=1e-3, atol=1e-3)


def test_a_float_layer_that_is_compiled_already_is_refused(sd):
    sd.text_encoder.compile(backend="eager")
    message = refused(lambda: load_lora(sd, of("text_encoder", text_matrices(sd))))
    assert "load the LoRA before torch.compile" in message and lora_scales(sd) == {}


def test_a_recorded_denoiser_takes_one_and_lets_it_go(sd, lora):
    recorded = copy.copy(sd)
    vars(recorded)["unet"] = RecordedDenoiser(sd.unet)
    before = draw("sd", recorded)
    load_lora(recorded, lora, name="a")
    assert distance(draw("sd", recorded), before) > 0
    assert torch.equal(draw("sd", recorded), draw("sd", sd))
    unload_lora(recorded)
    assert torch.equal(draw("sd", recorded), before)
