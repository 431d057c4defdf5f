"""Weight-only text encoders and VAE: saved, loaded by diffusers and transformers, damaged."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from architectures import clip_encoder, t5_encoder, vae
from quantize_runs import refused, tree
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.support.errors import StepQuantError
from stepquant.weight_only.config import WeightOnlyConfig
from stepquant.weight_only.quantizers import quantize_weights

MODELS = {
    "vae": (lambda: vae(4), AutoencoderKL),
    "clip": (clip_encoder, CLIPTextModel),
    "t5": (t5_encoder, T5EncoderModel),
}


def build(name, bits=8):
    torch.manual_seed(0)
    model = MODELS[name][0]()
    quantize_weights(model, f"the component '{name}'", bits, "minmax")
    return model


@pytest.fixture(params=[(name, bits) for name in MODELS for bits in (8, 4)], ids=str)
def saved(request, tmp_path):
    name, bits = request.param
    model = build(name, bits)
    model.save_pretrained(tmp_path / "model")
    return model, MODELS[name][1], tmp_path / "model"


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def change(folder, act):
    path = weights_of(folder)
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path, {"format": "pt"})


@torch.no_grad()
def run(model):
    if isinstance(model, AutoencoderKL):
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return model(x.to(model.dtype), sample_posterior=False).sample
    return model(torch.tensor([[0, 5, 9, 1]])).last_hidden_state


def test_every_linear_and_conv_layer_has_codes(saved):
    model, _, _ = saved
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers and all(isinstance(layer, WeightOnly) for layer in layers)


def test_a_saved_model_loads_bit_for_bit_and_saves_the_same_bytes(saved, tmp_path):
    model, kind, folder = saved
    loaded = kind.from_pretrained(folder)
    found, wanted = loaded.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(found[k].dtype == wanted[k].dtype for k in wanted)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert torch.equal(run(loaded), run(model))
    loaded.save_pretrained(tmp_path / "again")
    before, after = tree(folder), tree(tmp_path / "again")
    name = weights_of(folder).name
    assert after[name] == before[name]
    configs = [json.loads(files["config.json"]) for files in (before, after)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_loaded_in_bfloat16_codes_and_scales_are_the_same(saved):
    model, kind, folder = saved
    loaded = kind.from_pretrained(folder, dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        if name.endswith(".weight_scale") or tensor.dtype == torch.int8:
            assert torch.equal(loaded.state_dict()[name], tensor)
    y, wanted = run(loaded), run(model)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


def test_who_does_not_know_the_format_cannot_load_it(saved):
    """Above all, does not take the codes for weights."""
    _, kind, folder = saved
    code = (
        "import sys, diffusers, transformers\n"
        f"kind = getattr(transformers, '{kind.__name__}', None) or diffusers.{kind.__name__}\n"
        "kind.from_pretrained(sys.argv[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "Unknown quantization type" in done.stderr


def refused_load(kind, folder):
    """Whatever library loads it, and whatever it wraps the error in, it does not load."""
    with pytest.raises((StepQuantError, RuntimeError, ValueError, OSError)) as error:
        kind.from_pretrained(folder)
    return str(error.value)


def first(tensors, end):
    return min(name for name in tensors if name.endswith(end))


def test_a_scale_of_zero_is_named(saved):
    _, kind, folder = saved
    change(folder, lambda tensors: tensors[first(tensors, ".weight_scale")].zero_())
    assert ".weight_scale' holds values that are not scales" in refused_load(kind, folder)


def test_codes_of_another_dtype_are_refused(saved):
    _, kind, folder = saved

    def widen(tensors):
        name = first(tensors, ".weight_scale").removesuffix("_scale")
        tensors[name] = tensors[name].float()

    change(folder, widen)
    message = refused_load(kind, folder)
    assert "expected" in message and ("int8" in message or "'I8'" in message)


def test_a_zero_point_off_the_grid_is_named(saved):
    model, kind, folder = saved
    if model.hf_quantizer.quantization_config.bits == 8:
        return
    change(folder, lambda tensors: tensors[first(tensors, ".weight_zero_point")].fill_(16))
    assert ".weight_zero_point' holds 16: expected at most 15" in refused_load(kind, folder)


def test_a_scale_that_is_missing_is_refused(saved):
    _, kind, folder = saved
    change(folder, lambda tensors: tensors.pop(first(tensors, ".weight_scale")))
    message = refused_load(kind, folder)
    assert "weight_scale" in message if kind is AutoencoderKL else "'F32'" in message


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"format_version": 2}, "format version 2: expected 1"),
        ({"extra": 1}, "the unknown key 'extra'"),
        ({"bits": 5}, "weight-only component is 5: expected one of 4, 8"),
        ({"layers": "all"}, "layers of the config of a weight-only component is 'all'"),
        ({"layers": ["absent"]}, "names the layer 'absent', which is nothing in"),
    ],
)
def test_a_wrong_config_is_named(saved, edit, words):
    _, kind, folder = saved
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["quantization_config"] |= edit
    path.write_text(json.dumps(values))
    message = refused_load(kind, folder)
    assert words in message or ("layers" in edit and "'I8'" in message)


def test_the_config_round_trips():
    config = WeightOnlyConfig(["b", "a"])
    assert config.layers == ["a", "b"]
    assert WeightOnlyConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert json.loads(config.to_json_string()) == config.to_dict()
    assert not {"bits", "grids"} & set(config.to_dict())  # as before there were other bits
    config = WeightOnlyConfig(["a"], bits=4, grids="mse")
    assert WeightOnlyConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_shared_weights_and_subclasses_stay_float():
    class Own(nn.Linear):
        pass

    model = clip_encoder()
    layers = model.encoder.layers
    layers[0].mlp.fc1.weight = layers[1].mlp.fc1.weight
    layers[0].mlp.fc2 = Own(24, 16)
    quantize_weights(model, "it")
    kinds = {name: type(m) for name, m in model.named_modules() if ".mlp.fc" in name}
    assert kinds["encoder.layers.0.mlp.fc1"] is kinds["encoder.layers.1.mlp.fc1"] is nn.Linear
    assert kinds["encoder.layers.0.mlp.fc2"] is Own
    assert issubclass(kinds["encoder.layers.1.mlp.fc2"], WeightOnly)


def test_what_cannot_be_quantized_is_told():
    model = build("clip")
    assert "it is quantized already" in refused(lambda: quantize_weights(model, "it"))
    message = refused(lambda: quantize_weights(nn.Sequential(nn.Linear(2, 2)), "it"))
    assert "it is Sequential: expected a model of diffusers or transformers" in message
    assert "has no linear or conv layer" in refused(lambda: quantize_weights(nn.SiLU(), "it"))


@pytest.mark.parametrize("copied", [False, True])
def test_projections_of_codes_are_not_fused(copied):
    """They were concatenated as codes: an error of sizes, or other numbers."""
    model = build("vae")
    model = copy.deepcopy(model) if copied else model
    wanted = run(model)
    message = refused(model.fuse_qkv_projections)
    assert "the quantized layer 'encoder.conv_in'" in message
    assert torch.equal(run(model), wanted)
    float_vae = vae(4)
    before = run(float_vae)
    float_vae.fuse_qkv_projections()
    torch.testing.assert_close(run(float_vae), before)
