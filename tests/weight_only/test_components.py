"""Text encoders and VAE with 8-bit weights, in pipelines with a packed denoiser."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from architectures import ARCHITECTURES, build
from lora_files import matrices, of
from quantize_runs import refused, tree
from stepquant.api import load_lora, quantize, sample, unload_lora
from stepquant.runtime.layers.weight_only import WeightOnly

STEPS = 3
FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}
OTHERS = {
    "sd": ("text_encoder", "vae"),
    "sdxl": ("text_encoder", "text_encoder_2", "vae"),
    "dit": ("vae",),
    "pixart": ("text_encoder", "vae"),
    "sd3": ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"),
    "flux": ("text_encoder", "text_encoder_2", "vae"),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def run(name, out=None, model=None, **changes):
    arguments = {**ARCHITECTURES[name].arguments, **changes}
    return quantize(model or build(name), "minmax", 8, 8, out, STEPS, FEW, **arguments)


def draw(name, model):
    return sample(model, 2, STEPS, **ARCHITECTURES[name].arguments)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantize_save_load_sample(name, tmp_path):
    chosen = dict.fromkeys(OTHERS[name], "w8")
    float_pipeline = build(name)
    result = run(name, tmp_path / "out", float_pipeline, components=chosen)
    for part in chosen:
        model, before = getattr(result.pipeline, part), getattr(float_pipeline, part)
        layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert layers and all(isinstance(layer, WeightOnly) for layer in layers)
        assert not any(isinstance(layer, WeightOnly) for layer in before.modules())
        record = result.record["components"][part]
        assert record["bits"] == "w8" and record["layers"] == len(layers)
        assert record["checkpoint_bytes"] > 0
    assert result.record["provenance"]["components"] == chosen
    assert json.loads(json.dumps(result.record, allow_nan=False)) == result.record

    images = draw(name, result.pipeline)
    assert torch.equal(draw(name, tmp_path / "out"), images)
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(name, loaded), images)
    assert not torch.equal(images, draw(name, run(name).pipeline))
    for part in chosen:
        found, wanted = (answer(getattr(p, part)) for p in (result.pipeline, float_pipeline))
        error = (found - wanted).square().mean() / wanted.square().mean()
        assert 0 < float(error) < 1e-3


@torch.no_grad()
def answer(part):
    """Pixels of a VAE, features of a text encoder."""
    if hasattr(part, "decode"):
        channels = part.config.latent_channels
        x = torch.randn(1, channels, 4, 4, generator=torch.Generator().manual_seed(0))
        return part.decode(x).sample
    return part(torch.tensor([[0, 5, 9, 1]])).last_hidden_state


def test_weights_take_a_quarter_on_disk(tmp_path):
    pipeline = build("sd")
    sizes = {}
    for name, components in (("plain", {}), ("small", {"vae": "w8"})):
        run("sd", tmp_path / name, pipeline, components=components)
        tensors = [*(tmp_path / name / "vae").glob("*.safetensors")]
        sizes[name] = sum(path.stat().st_size for path in tensors)
    weights = sum(m.weight.numel() for m in pipeline.vae.modules() if hasattr(m, "kernel_size"))
    assert sizes["plain"] - sizes["small"] > 1.5 * weights  # 3, less the scales of small layers


def test_two_equal_runs_write_equal_bytes_and_the_denoiser_is_the_same(tmp_path):
    chosen = dict.fromkeys(OTHERS["sd"], "w8")
    for name, components in (("a", chosen), ("b", chosen), ("plain", None)):
        run("sd", tmp_path / name, components=components)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    tensors = "unet/diffusion_pytorch_model.safetensors"
    assert tree(tmp_path / "a")[tensors] == tree(tmp_path / "plain")[tensors]


def test_a_lora_of_a_text_encoder_with_8_bit_weights():
    pipeline = run("sd", components={"text_encoder": "w8"}).pipeline
    layer_name = "encoder.layers.0.self_attn.q_proj"
    layer = pipeline.text_encoder.get_submodule(layer_name)
    tensors, x = matrices(build("sd").text_encoder, [layer_name]), torch.randn(2, layer.in_features)
    before = layer(x)
    load_lora(pipeline, of("text_encoder", tensors))
    A, B = tensors.values()
    torch.testing.assert_close(layer(x) - before, x @ A.T @ B.T, rtol=1e-4, atol=1e-5)
    unload_lora(pipeline)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize(
    ("components", "words"),
    [
        (
            {"text_encoder_9": "w8"},
            "'text_encoder_9' of StableDiffusionPipeline cannot be quantized",
        ),
        ({"scheduler": "w8"}, "expected one of vae, text_encoder"),
        ({"unet": "w8"}, "the recipe sets its bits"),
        ({"vae": "w3"}, "the component 'vae' is set to 'w3': expected one of w8, w4"),
        ({"vae": 8}, "the component 'vae' is set to 8: expected one of w8, w4"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_sampled(components, words, monkeypatch):
    monkeypatch.setattr("stepquant.verbs.calibration_inputs.capture_trajectories", None)
    assert words in refused(lambda: run("sd", components=components))


def test_a_component_that_is_quantized_already(tmp_path):
    once = run("sd", components={"vae": "w8"}).pipeline
    pipeline = build("sd")
    pipeline.register_modules(vae=once.vae)
    message = refused(lambda: run("sd", model=pipeline, components={"vae": "w8"}))
    assert "the component 'vae' is quantized already: expected a float model" in message
