"""`--lora` and `--config`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from architectures import build
from cli_runs import record, refused, run
from lora_files import matrices, of
from single_files import save_as_one_file
from stepquant.api import evaluate as api_evaluate
from stepquant.api import load, load_lora
from stepquant.cli.opening import Lora, parse_lora

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn1.to_q", "up_blocks.1.resnets.0.conv1"]
PROMPT = ("--prompt=a cat", "--steps=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`float` and `packed` pipelines, and the LoRAs `ink` and `other`, of layers of another one."""
    folder = tmp_path_factory.mktemp("loras")
    pipeline = build("sd")
    pipeline.save_pretrained(folder / "float")
    tensors = of("unet", matrices(pipeline.unet, LAYERS, size=2.0))
    save_file(tensors, folder / "ink.safetensors")
    wrong = {key.replace("attn1", "attn7"): value for key, value in tensors.items()}
    save_file(wrong, folder / "other.safetensors")
    few = ("--set=calibration.trajectories=2", "--recipe=minmax")
    result = run("quantize", folder / "float", *PROMPT, *few, "--out", folder / "packed")
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ink.safetensors", Lora("ink.safetensors", 1.0, "ink")),
        ("a/ink v1.5.safetensors=0.8", Lora("a/ink v1.5.safetensors", 0.8, "ink_v1_5")),
        ("fox=a/ink.safetensors=-2", Lora("a/ink.safetensors", -2.0, "fox")),
        ("fox=someone/a-lora", Lora("someone/a-lora", 1.0, "fox")),
        ("./a=b.safetensors=1e-1", Lora("./a=b.safetensors", 0.1, "a_b")),
        ("a/folder/", Lora("a/folder/", 1.0, "folder")),
    ],
)
def test_names_files_and_scales_are_told_apart(text, wanted):
    assert parse_lora(text) == wanted


def images(folder, tmp_path, name, *more):
    out = tmp_path / name
    result = run("sample", folder / "packed", *PROMPT, "--num=1", "--out", out, *more)
    assert result.exit_code == 0, result.stderr
    return (out / "00000.png").read_bytes()


def test_sample_draws_with_loras_and_says_so(folder, tmp_path):
    file = tmp_path / "record"
    ink = folder / "ink.safetensors"
    plain = images(folder, tmp_path, "plain")
    both = images(
        folder, tmp_path, "both", f"--lora={ink}=0.5", f"--lora=b={ink}=0.5", "--json", file
    )
    assert images(folder, tmp_path, "once", "--lora", ink) == both != plain
    assert images(folder, tmp_path, "none", f"--lora={ink}=0") == plain
    found = record(file)
    assert found["arguments"]["lora"] == [f"{ink}=0.5", f"b={ink}=0.5"]
    layers = [f"unet.{name}" for name in LAYERS]
    first, second = found["results"]["loras"]
    assert first == {"name": "ink", "source": str(ink), "scale": 0.5, "layers": layers}
    assert second["name"] == "b"


def test_evaluate_gives_both_models_the_lora(folder, tmp_path):
    """So that what differs is the quantization, not the LoRA."""
    values = {}
    for name, more in (("plain", []), ("ink", ["--lora", folder / "ink.safetensors"])):
        file = tmp_path / name
        result = run(
            "evaluate", folder / "packed", "--against", folder / "float", *PROMPT, "--num=2",
            "--json", file, *more,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        values[name] = record(file)["results"]
    assert [entry["name"] for entry in values["ink"]["loras"]] == ["ink"]
    assert values["plain"]["loras"] == []
    errors = {
        name: torch.tensor([row["relative_mse"] for row in found["noise_error"]])
        for name, found in values.items()
    }
    assert not torch.equal(errors["plain"], errors["ink"])
    one_sided = load(folder / "float")
    load_lora(one_sided, folder / "ink.safetensors")
    record_of_one = api_evaluate(one_sided, folder / "float", 2, 2, prompts=["a cat"])
    least = min(row["relative_mse"] for row in record_of_one["noise_error"])
    assert 5 * errors["ink"].max() < least


def test_evaluate_keeps_the_feature_network_of_an_embedded_model(tmp_path):
    """Which goes by the name of the model."""
    file, model = tmp_path / "record", "builtin:fashion-ddpm"
    tensors = matrices(load(model).unet, ["conv_in"], size=0.1)
    save_file(tensors, tmp_path / "small.safetensors")
    result = run(
        "evaluate", model, "--against", model, "--num=2", "--steps=1",
        "--lora", tmp_path / "small.safetensors", "--json", file,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    results = record(file)["results"]
    assert results["features"] == "fashion" and results["paired_psnr_db"] == 100


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}/other.safetensors", f"UNet2DConditionModel has no layer '{BLOCK}.attn7.to_q'"),
        ("{}/nothing.safetensors", "nothing.safetensors' does not exist"),
        ("{}/ink.safetensors=nan", "the scale of a LoRA is nan"),
        ("=0.5", "--lora '=0.5' names no file"),
    ],
    ids=["layers", "absent", "scale", "empty"],
)
def test_loras_that_do_not_fit_are_told(folder, tmp_path, text, words):
    more = (*PROMPT, "--lora", text.format(folder), "--out", tmp_path / "out")
    assert words in refused("sample", folder / "packed", *more)
    assert list(tmp_path.iterdir()) == []


def test_two_of_one_name_are_told(folder):
    ink = folder / "ink.safetensors"
    message = refused(
        "sample", folder / "packed", *PROMPT, "--lora", ink, "--lora", ink, "--grid=x.png"
    )
    assert "a LoRA called 'ink' is loaded already" in message


def test_a_single_file_is_quantized_and_compared_with(folder, tmp_path):
    file = save_as_one_file(build("sd"), tmp_path / "sd.safetensors")
    config = ("--config", folder / "float")
    few = ("--set=calibration.trajectories=2", "--recipe=minmax")
    packed = tmp_path / "packed"
    result = run("quantize", file, *config, *PROMPT, *few, "--out", packed)
    assert result.exit_code == 0, result.stderr
    for verb in (
        ("sample", file, *PROMPT, "--num=1", "--grid", tmp_path / "grid.png"),
        ("evaluate", packed, "--against", file, *PROMPT, "--num=1"),
        ("inspect", file, *PROMPT, "--num=1"),
        ("bench", packed, "--against", file, "--batch=1", "--repeats=1"),
    ):
        result = run(*verb, *config)
        assert result.exit_code == 0, (verb, result.stderr)


def test_a_config_without_a_single_file_is_told(folder):
    message = refused("sample", folder / "packed", *PROMPT, "--grid=x.png", "--config=float")
    assert "--config 'float' was given for" in message and "a single safetensors file" in message
