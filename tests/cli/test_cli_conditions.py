"""Prompts, labels and guidance on the command line."""

from __future__ import annotations

import pytest

from architectures import build
from cli_runs import record, refused, run

FEW = ("--steps=2", "--set=calibration.trajectories=2", "--recipe=minmax")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Float pipelines by name."""
    folder = tmp_path_factory.mktemp("conditional")
    for name in ("sd", "dit"):
        build(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def prompts(folders):
    file = folders / "prompts.txt"
    file.write_text("a cat\n\n  boat \n", encoding="utf-8")
    return file


def test_prompts_come_from_options_and_a_file(folders, prompts, tmp_path):
    common = ("--prompt=fog", "--prompts", prompts, "--guidance=2.5", "--json", tmp_path / "record")
    result = run("quantize", folders / "sd", *FEW, *common, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    results = record(tmp_path / "record")["results"]
    conditioning = results["provenance"]["conditioning"]
    assert (conditioning["prompts"], conditioning["guidance"]) == (3, 2.5)

    grid = tmp_path / "grid.png"
    for verb in (
        ("sample", tmp_path / "out", "--num=3", "--grid", grid),
        ("evaluate", tmp_path / "out", "--against", folders / "sd", "--num=2"),
        ("inspect", folders / "sd", "--num=1"),
    ):
        result = run(*verb, "--steps=2", *common)
        assert result.exit_code == 0, (verb, result.stderr)
    assert grid.is_file()
    result = run("bench", tmp_path / "out", "--against", folders / "sd", "--batch=1", "--repeats=1")
    assert result.exit_code == 0, result.stderr


def test_other_components_with_8_bit_weights(folders, prompts, tmp_path):
    common = ("--prompts", prompts, "--component=text_encoder=w8", "--component=vae=w8")
    file = tmp_path / "record"
    result = run(
        "quantize", folders / "sd", *FEW, *common, "--json", file, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.stderr
    assert "vae: weights of w8" in result.stdout
    components = record(file)["results"]["components"]
    assert components.keys() == {"text_encoder", "vae"}
    assert components["vae"]["checkpoint_bytes"] < components["vae"]["float32_bytes"]
    for wrong, words in (
        ("--component=vae", "--component 'vae' has no key or no '=': expected key=value"),
        ("--component=vae=w3", "'vae' is set to 'w3': expected one of w8, w4"),
    ):
        message = refused(
            "quantize", folders / "sd", *FEW, *common[:2], wrong, "--out", tmp_path / "other"
        )
        assert words in message


def test_labels_and_guidance_of_a_class_conditional_model(folders, tmp_path):
    common = ("--label=207", "--label=3", "--guidance=1.5")
    file = tmp_path / "record"
    result = run(
        "quantize", folders / "dit", *FEW, *common, "--json", file, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.stderr
    conditioning = record(file)["results"]["provenance"]["conditioning"]
    assert conditioning == {"labels": [207, 3], "guidance": 1.5}


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("sd", [], "StableDiffusionPipeline needs prompts and got none"),
        ("sd", ["--prompts=nowhere.txt"], "--prompts 'nowhere.txt' cannot be read"),
        ("sd", ["--prompt=fog", "--label=1"], "takes no class labels"),
        ("sd", ["--prompt=fog", "--call=hight=8"], "takes no 'hight'"),
        ("sd", ["--prompt=fog", "--call=height"], "--call 'height' has no key or no '='"),
        ("dit", ["--prompt=fog"], "DiTPipeline takes no prompts"),
        ("dit", ["--label=1000"], "class label is 1000: expected 0 to 999"),
    ],
)
def test_conditions_that_do_not_fit_are_told(folders, tmp_path, name, more, words):
    out = tmp_path / "out"
    assert words in refused("quantize", folders / name, *FEW, *more, "--out", out)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_of_prompts_is_told(folders, tmp_path):
    file = tmp_path / "none.txt"
    file.write_text("\n \n")
    message = refused("sample", folders / "sd", "--grid=x.png", "--prompts", file)
    assert "has no prompt" in message
