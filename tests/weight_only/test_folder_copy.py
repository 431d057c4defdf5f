"""What a weight-only recipe reads and copies: all that `load` reads, nothing outside the folder."""

from __future__ import annotations

import json
import os
import shutil
import stat

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from architectures import build
from quantize_runs import left, refused, tree
from stepquant.api import load, quantize
from stepquant.models.weight_files import WeightFiles, weight_paths
from stepquant.weight_only import conversion, folder_copy
from stepquant.weight_only.conversion import convert

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "sd"
    build("sd").save_pretrained(folder)
    return folder


@pytest.fixture
def sd(float_folder, tmp_path):
    return shutil.copytree(float_folder, tmp_path / "sd")


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "secret.json"
    path.write_text('"dear"')
    path.chmod(0o600)
    return path


def outside(sd, secret):
    return {
        "a file": lambda: (sd / "notes.json").symlink_to(secret),
        "a file of a component": lambda: (sd / "tokenizer" / "notes.json").symlink_to(secret),
        "a folder": lambda: (sd / "notes").symlink_to(secret.parent),
        "nowhere": lambda: (sd / "notes").symlink_to(sd / "absent"),
        "itself": lambda: (sd / "notes").symlink_to(sd / "notes"),
        "the folder above": lambda: (sd / "unet" / "notes").symlink_to(sd),
        "a pipe": lambda: os.mkfifo(sd / "notes"),
        "the weights": lambda: (
            shutil.move(sd / "unet" / WEIGHTS, secret.parent),
            (sd / "unet" / WEIGHTS).symlink_to(secret.parent / WEIGHTS),
        ),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "a file",
        "a file of a component",
        "a folder",
        "nowhere",
        "itself",
        "the folder above",
        "a pipe",
        "the weights",
    ],
)
def test_links_out_of_the_folder_are_refused_before_the_work(
    sd, secret, tmp_path, monkeypatch, kind
):
    outside(sd, secret)[kind]()
    monkeypatch.setattr(conversion, "_quantize_one", lambda *_: pytest.fail("worked"))
    message = refused(lambda: convert(sd, tmp_path / "out"))
    assert f"'{sd}" in message and "expected" in message
    assert left(tmp_path) == ["elsewhere", "sd"]


@pytest.mark.parametrize("name", ["../vae/" + WEIGHTS, "/etc/passwd", "..", "a\\b", ""])
def test_an_index_that_names_files_elsewhere_is_refused(sd, tmp_path, name):
    (sd / "unet" / WEIGHTS).rename(sd / "unet" / "one.safetensors")
    keys = load_file(sd / "unet" / "one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "one.safetensors")}
    index["weight_map"][min(keys)] = name
    (sd / "unet" / INDEX).write_text(json.dumps(index))
    for act in (lambda: convert(sd, tmp_path / "out"), lambda: load(sd)):
        assert f"names the shard '{name}': expected the name of a file beside it" in refused(act)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_named(sd, tmp_path, text):
    (sd / "unet" / INDEX).write_text(text)
    message = refused(lambda: convert(sd, tmp_path / "out"))
    assert f"'{sd / 'unet' / INDEX}' " in message


def test_links_within_the_folder_and_into_the_cache_are_followed(sd, tmp_path, monkeypatch):
    (sd / "copy.json").symlink_to("model_index.json")
    cache = tmp_path / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    shutil.move(sd / "unet" / WEIGHTS, cache / "blobs" / "abc")
    shutil.move(sd, cache / "snapshots" / "main")
    snapshot = cache / "snapshots" / "main"
    (snapshot / "unet" / WEIGHTS).symlink_to("../../../blobs/abc")
    convert(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "copy.json").is_file()
    assert not (tmp_path / "out" / "copy.json").is_symlink()
    link = tmp_path / "linked"
    shutil.copytree(snapshot, link, symlinks=True)
    (link / "unet" / WEIGHTS).unlink()
    (link / "unet" / WEIGHTS).symlink_to(cache / "blobs" / "abc")
    assert "outside the model's folder" in refused(lambda: convert(link, tmp_path / "out2"))
    monkeypatch.setattr(folder_copy, "HF_HUB_CACHE", str(tmp_path))
    convert(link, tmp_path / "out2")
    assert tree(tmp_path / "out2") == tree(tmp_path / "out")


def test_private_files_stay_private(sd, tmp_path):
    (sd / "vae" / WEIGHTS).chmod(0o600)
    convert(sd, tmp_path / "out")
    modes = {
        name: stat.S_IMODE((tmp_path / "out" / name).stat().st_mode)
        for name in (f"vae/{WEIGHTS}", "model_index.json")
    }
    assert modes[f"vae/{WEIGHTS}"] == 0o600
    assert modes["model_index.json"] == stat.S_IMODE((sd / "model_index.json").stat().st_mode)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000], ids=["cut", "bytes", "deep"])
def test_a_json_file_that_is_none_is_copied_like_any_other(sd, tmp_path, content):
    (sd / "notes.json").write_bytes(content)
    convert(sd, tmp_path / "out")
    assert (tmp_path / "out" / "notes.json").read_bytes() == content


def rewrite(path, act):
    tensors = load_file(path)
    save_file({key: value.contiguous() for key, value in act(tensors).items()}, path)


def packed(folder, out):
    convert(folder, out, components={"vae": "w8"})
    return load(out)


def same(a, b):
    for name in ("unet", "vae"):
        found, wanted = getattr(a, name).state_dict(), getattr(b, name).state_dict()
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_packed_as_what_they_stand_for(sd, tmp_path, dtype):
    plain = shutil.copytree(sd, tmp_path / "plain")
    for folder, back in ((sd, False), (plain, True)):
        for name in ("unet", "vae"):
            rewrite(
                folder / name / WEIGHTS,
                lambda tensors, back=back: {
                    key: value.to(dtype).to(torch.bfloat16) if back else value.to(dtype)
                    for key, value in tensors.items()
                },
            )
    assert load(sd).unet.dtype.is_floating_point
    same(packed(sd, tmp_path / "a"), packed(plain, tmp_path / "b"))


def test_eight_bit_floats_that_are_no_numbers_are_refused(sd, tmp_path):
    rewrite(
        sd / "unet" / WEIGHTS,
        lambda tensors: {k: (v * torch.nan).to(torch.float8_e4m3fn) for k, v in tensors.items()},
    )
    assert "holds NaN or infinity" in refused(lambda: convert(sd, tmp_path / "out"))


OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old(name):
    for new, before in OLD_NAMES.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
    return name


def test_attention_under_its_old_names_is_read(sd, tmp_path):
    plain = shutil.copytree(sd, tmp_path / "plain")
    rewrite(sd / "vae" / WEIGHTS, lambda tensors: {old(k): v for k, v in tensors.items()})
    assert load_file(sd / "vae" / WEIGHTS).keys() != load_file(plain / "vae" / WEIGHTS).keys()
    same(packed(sd, tmp_path / "a"), packed(plain, tmp_path / "b"))


@pytest.mark.parametrize("shards", ["10GB", "20KB"])
def test_weights_in_a_variant_only_are_read(float_folder, tmp_path, shards):
    pipeline = load(float_folder)
    pipeline.save_pretrained(tmp_path / "fp16", variant="fp16", max_shard_size=shards)
    same(load(tmp_path / "fp16"), pipeline)
    found = packed(tmp_path / "fp16", tmp_path / "a")
    same(found, packed(float_folder, tmp_path / "b"))
    found.save_pretrained(tmp_path / "again", variant="fp16")
    same(load(tmp_path / "again"), found)
    record = quantize(
        tmp_path / "fp16", "minmax", steps=2, prompts="a", settings={"calibration.trajectories": 1}
    ).record
    assert record["bits"] == "w8a8"


def test_a_component_with_plain_weights_needs_no_variant(sd):
    unet = UNet2DConditionModel.from_pretrained(sd / "unet")
    unet.save_pretrained(sd / "unet", variant="fp16")
    assert weight_paths(sd / "unet") == [sd / "unet" / WEIGHTS]
    (sd / "unet" / WEIGHTS).unlink()
    assert WeightFiles(sd / "unet").parameters == unet.num_parameters()
    assert load(sd).vae.num_parameters() > 0


def test_several_variants_are_refused(sd):
    vae = AutoencoderKL.from_pretrained(sd / "vae")
    for variant in ("fp16", "ema"):
        vae.save_pretrained(sd / "vae", variant=variant)
    (sd / "vae" / WEIGHTS).unlink()
    assert "in the variants ema, fp16: expected" in refused(lambda: weight_paths(sd / "vae"))
    assert "(vae: ema, fp16): expected one variant" in refused(lambda: load(sd))


def test_the_output_may_be_in_the_home_folder(sd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    result = quantize("~/sd", "weight-only", out="~/out")
    assert result.folder == tmp_path / "out" and left(tmp_path) == ["out", "sd"]
