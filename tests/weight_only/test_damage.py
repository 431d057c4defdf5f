"""Damaged weight-only models are refused, whatever was changed; older ones load as they did."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from architectures import clip_encoder, vae
from quantize_runs import tree
from stepquant.support.errors import StepQuantError
from stepquant.weight_only.config import DynamicConfig, WeightOnlyConfig
from stepquant.weight_only.quantizers import quantize_weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
SUM = "stepquant_sha256"
LAYER = "encoder.mid_block.resnets.0.conv1"


@pytest.fixture(scope="module", params=[8, 4], ids=["w8", "w4"])
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = vae(4)
    quantize_weights(model, "it", request.param, "minmax")
    folder = tmp_path_factory.mktemp("saved") / "vae"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def rewrite(folder, act):
    tensors = load_file(folder / WEIGHTS)
    act(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def reconfigure(folder, act):
    values = json.loads((folder / "config.json").read_text())
    act(values)
    (folder / "config.json").write_text(json.dumps(values))


def swap(a, b):
    def act(tensors):
        tensors[a], tensors[b] = tensors[b], tensors[a]

    return act


CHANGES = {
    "a code": (lambda t: t[f"{LAYER}.weight"][3:4].add_(1), "have the SHA-256"),
    "a scale": (lambda t: t[f"{LAYER}.weight_scale"][:1].mul_(2), "have the SHA-256"),
    "a bias": (lambda t: t[f"{LAYER}.bias"][:1].add_(1), "have the SHA-256"),
    "a norm": (lambda t: t["encoder.conv_norm_out.weight"][:1].add_(1), "have the SHA-256"),
    "swapped codes": (
        swap(f"{LAYER}.weight", "encoder.mid_block.resnets.0.conv2.weight"),
        "have the SHA-256",
    ),
    "swapped norms": (
        swap("encoder.conv_norm_out.weight", "encoder.conv_norm_out.bias"),
        "have the SHA-256",
    ),
    "an extra tensor": (
        lambda t: t.update({"more.weight": torch.ones(2)}),
        "holds the unexpected tensor 'more.weight'",
    ),
    "a missing bias": (lambda t: t.pop(f"{LAYER}.bias"), f"lacks the tensor '{LAYER}.bias'"),
    "a missing sum": (lambda t: t.pop(SUM), f"lacks the tensor '{SUM}'"),
    "integers as a bias": (
        lambda t: t.update({f"{LAYER}.bias": t[f"{LAYER}.bias"].to(torch.int64)}),
        f"'{LAYER}.bias' is torch.int64 of shape [8]: expected a floating-point dtype",
    ),
    "another shape": (
        lambda t: t.update({f"{LAYER}.bias": torch.ones(9)}),
        f"'{LAYER}.bias' is torch.float32 of shape [9]",
    ),
    "NaN": (
        lambda t: t["encoder.conv_norm_out.bias"][:1].fill_(torch.nan),
        "'encoder.conv_norm_out.bias' holds NaN or infinity",
    ),
    "infinity": (
        lambda t: t[f"{LAYER}.bias"][:1].fill_(torch.inf),
        f"'{LAYER}.bias' holds NaN or infinity",
    ),
    "scales of another dtype": (
        lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].bfloat16()}),
        f"'{LAYER}.weight_scale' is torch.bfloat16",
    ),
    "a sum of another kind": (
        lambda t: t.update({SUM: torch.ones(32)}),
        f"tensor '{SUM}' is torch.float32",
    ),
}


def refused(folder) -> str:
    with pytest.raises(StepQuantError) as error:
        AutoencoderKL.from_pretrained(folder)
    return str(error.value)


@pytest.mark.parametrize(("act", "words"), CHANGES.values(), ids=CHANGES)
def test_a_changed_tensor_is_refused(copy, act, words):
    rewrite(copy, act)
    assert words in refused(copy)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda v: v.update(act_fn="relu"), "'act_fn' in config.json of AutoencoderKL is 'relu'"),
        (lambda v: v.update(scaling_factor=1), "'scaling_factor' in config.json"),
        (lambda v: v["quantization_config"].pop("architecture"), f"unexpected tensor '{SUM}'"),
        (
            lambda v: v["quantization_config"].update(quant_method="stepquant_dynamic"),
            "",
        ),
        (lambda v: v["quantization_config"].update(architecture=[1]), "architecture of the config"),
    ],
)
def test_a_changed_config_is_refused(copy, act, words):
    reconfigure(copy, act)
    assert words in refused(copy)


def test_no_flipped_bit_computes_something_else(copy):
    path = copy / WEIGHTS
    whole = path.read_bytes()
    wanted = load_file(path)
    wanted.pop(SUM)
    draw = random.Random(0)
    for place in draw.sample(range(8, len(whole)), 40):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found = AutoencoderKL.from_pretrained(copy).state_dict()
        except (StepQuantError, OSError):  # diffusers reports a damaged header itself
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def without_sums(folder):
    rewrite(folder, lambda tensors: tensors.pop(SUM))
    reconfigure(folder, lambda values: values["quantization_config"].pop("architecture"))


def test_a_folder_of_an_older_release_loads_and_is_saved_as_it_was(copy, saved, tmp_path):
    without_sums(copy)
    loaded, known = AutoencoderKL.from_pretrained(copy), AutoencoderKL.from_pretrained(saved)
    assert all(map(torch.equal, loaded.state_dict().values(), known.state_dict().values()))
    loaded.save_pretrained(tmp_path / "again")
    assert tree(tmp_path / "again")[WEIGHTS] == tree(copy)[WEIGHTS]
    rewrite(copy, lambda tensors: tensors[f"{LAYER}.bias"].fill_(torch.nan))
    assert "NaN or infinity" in refused(copy)


def test_shards_are_covered_too(saved, tmp_path):
    model = AutoencoderKL.from_pretrained(saved)
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "shards")
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    for shard in (tmp_path / "shards").glob("*.safetensors"):
        tensors = load_file(shard)
        name = next((name for name in tensors if name.endswith(".bias")), None)
        if name is not None:
            tensors[name][:1] += 1
            save_file(tensors, shard, {"format": "pt"})
            break
    assert "have the SHA-256" in refused(tmp_path / "shards")


@pytest.mark.parametrize("config", [WeightOnlyConfig(), WeightOnlyConfig(bits=4), DynamicConfig()])
def test_models_quantized_at_load_are_covered_too(tmp_path, config):
    vae(4).save_pretrained(tmp_path / "float")
    model = AutoencoderKL.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "packed")
    AutoencoderKL.from_pretrained(tmp_path / "packed")
    rewrite(tmp_path / "packed", lambda tensors: tensors[f"{LAYER}.bias"][:1].add_(1))
    assert "have the SHA-256" in refused(tmp_path / "packed")


def test_a_model_with_nan_is_not_saved(tmp_path):
    model = vae(4)
    model.encoder.conv_norm_out.bias.data[0] = torch.nan
    quantize_weights(model, "it")
    with pytest.raises(StepQuantError, match=r"'encoder\.conv_norm_out\.bias' holds NaN"):
        model.save_pretrained(tmp_path / "vae")


@pytest.fixture
def text(tmp_path):
    torch.manual_seed(0)
    model = clip_encoder()
    quantize_weights(model, "it", 4, "minmax")
    model.save_pretrained(tmp_path / "text")
    return tmp_path / "text"


def change_text(folder, act):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    act(tensors)
    save_file(tensors, path, {"format": "pt"})


TEXT = {
    "a code": lambda t: t[next(n for n in t if n.endswith("fc1.weight"))][:1].add_(1),
    "a scale": lambda t: t[next(n for n in t if n.endswith("fc1.weight_scale"))][:1].mul_(2),
    "swapped codes": lambda t: swap(
        *[n for n in t if n.endswith(("q_proj.weight", "k_proj.weight"))][:2]
    )(t),
    "NaN": lambda t: t[next(n for n in t if n.endswith("fc1.bias"))][:1].fill_(torch.nan),
}


@pytest.mark.parametrize("act", TEXT.values(), ids=TEXT)
def test_a_changed_text_encoder_is_refused(text, act):
    change_text(text, act)
    with pytest.raises(StepQuantError, match=r"have the SHA-256|holds NaN"):
        CLIPTextModel.from_pretrained(text)


@pytest.mark.parametrize("key", ["hidden_act", "layer_norm_eps"])
def test_a_text_encoder_of_another_architecture_is_refused(text, key):
    reconfigure(text, lambda v: v.update({key: {"hidden_act": "relu"}.get(key, 0.1)}))
    with pytest.raises(StepQuantError, match=f"'{key}' in config.json of CLIPTextModel is"):
        CLIPTextModel.from_pretrained(text)


def test_a_text_encoder_whose_config_changed_loads_again(text, tmp_path):
    """As textual inversion changes it, which adds tokens."""
    model = CLIPTextModel.from_pretrained(text)
    more = model.config.vocab_size + 1
    model.resize_token_embeddings(more)
    model.save_pretrained(tmp_path / "again")
    assert CLIPTextModel.from_pretrained(tmp_path / "again").config.vocab_size == more


def test_a_text_encoder_loads_in_another_dtype_and_saves_again(text, tmp_path):
    loaded = CLIPTextModel.from_pretrained(text, dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "again")
    again = CLIPTextModel.from_pretrained(tmp_path / "again")
    known = CLIPTextModel.from_pretrained(text).state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, known[name].to(tensor.dtype))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [1e-45, 1e-44, 1e-43, 1e-41, 1e-39, 1e-38, 1e-36])
def test_a_channel_of_the_smallest_numbers_survives_a_save(tmp_path, size, bits):
    torch.manual_seed(0)
    model = vae(4)
    model.encoder.conv_in.weight.data[0] = size * torch.linspace(-1, 1, 27).view(3, 3, 3)
    model.encoder.conv_in.weight.data[1] = 0
    wanted = model.encoder.conv_in.weight.detach().clone()
    quantize_weights(model, "it", bits, "minmax")
    model.save_pretrained(tmp_path / "vae")
    found = AutoencoderKL.from_pretrained(tmp_path / "vae").encoder.conv_in.float_weight(
        torch.float32
    )
    assert bool(torch.isfinite(found).all()) and not found[1].any()
    # Where the scale is no number that can be inverted, zero is the nearest level.
    assert float((found[0] - wanted[0]).abs().max()) <= max(size / 2 ** (bits - 1), 3e-38)
