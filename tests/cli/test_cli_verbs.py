import inspect
import os
import subprocess
import sys

import pytest
import yaml
from PIL import Image

import stepquant
from cli_runs import TINY, record, refused, run, tree
from stepquant import api
from stepquant.cli.quantize import quantize as quantize_verb
from stepquant.engines import openvino_export

ENVELOPE = {"verb", "stepquant_version", "versions", "arguments", "results"}


def checked(path, verb):
    found = record(path)
    assert set(found) == ENVELOPE
    assert found["verb"] == verb
    assert found["stepquant_version"] == stepquant.__version__
    assert {"python", "torch", "diffusers", "numpy", "safetensors"} == set(found["versions"])
    assert not {"quiet", "json_file"} & set(found["arguments"])
    return found["arguments"], found["results"]


def test_quantize_writes_a_pipeline_and_says_how_it_went(float_folder, packed_folder):
    arguments, results = checked(packed_folder.with_name("packed.json"), "quantize")
    assert arguments["model"] == str(float_folder)
    assert arguments["weights"] == 4
    assert arguments["set"][0] == "calibration.trajectories=2"
    assert arguments["resume"] is False
    assert results["bits"] == "w4a8"
    assert results["out"] == str(packed_folder)
    assert results["recipe"]["calibration"]["trajectories"] == 2
    assert results["provenance"]["seed"] == 3
    assert results["times_smaller"] > 1
    assert {"mean_weight_bits", "float32_bytes", "checkpoint_bytes", "seconds"} <= set(results)
    shown = packed_folder.with_name("packed.txt").read_text()
    assert "w4a8" in shown
    assert f"written to {packed_folder}" in shown
    assert [path.name for path in packed_folder.parent.glob("*.work")] == []


def test_weights_are_quantized_without_calibration(float_folder, tmp_path):
    out, json_file = tmp_path / "w4", tmp_path / "record.json"
    recipe = ("--recipe", "weight-only")
    result = run("quantize", float_folder, *recipe, "--out", out, "--json", json_file)
    assert result.exit_code == 0, result.stderr
    arguments, results = checked(json_file, "quantize")
    assert (arguments["recipe"], arguments["weights"]) == ("weight-only", None)
    assert results["out"] == str(out) and results["bits"] == "w4"
    assert results["recipe"]["kind"] == "weight-only"
    assert results["times_smaller"] > 2
    assert f"written to {out}" in result.stdout
    for verb in (
        ("sample", out, "--num=1", "--steps=2", "--grid", tmp_path / "grid.png"),
        ("evaluate", out, "--against", float_folder, "--num=1", "--steps=2"),
    ):
        assert run(*verb).exit_code == 0
    timed = run("bench", out, "--against", float_folder, "--batch=1", "--repeats=1")
    assert timed.exit_code == 0 and "weight-only layers; " in timed.stdout
    shown = run("inspect", out)
    assert shown.exit_code == 0
    assert "weight-only layers; layers that stay float: conv_in, conv_out" in shown.stdout
    again = ("quantize", out, *recipe, "--out", tmp_path / "again")
    assert refused(*again).startswith("the component 'unet' is quantized already")
    assert "the recipe 'weight-only' got activations: expected weights" in refused(
        "quantize", float_folder, *recipe, "--activations=8", "--out", tmp_path / "again"
    )


def test_pack_is_the_old_name_of_that_and_says_the_new_one(float_folder, tmp_path):
    out, new = tmp_path / "w4", tmp_path / "new"
    result = run(
        "pack", float_folder, "--out", out, "--grids=mse", "--json", tmp_path / "record.json"
    )
    assert result.exit_code == 0, result.stderr
    told = f"run stepquant quantize {float_folder} --recipe weight-only --weights 4 --set ranges"
    assert told in result.stderr and "deprecated" in result.stderr
    arguments, results = checked(tmp_path / "record.json", "pack")
    assert (arguments["weights"], arguments["grids"]) == (4, "mse")
    assert results["out"] == str(out) and "recipe" not in results
    same = ("--recipe=weight-only", "--set=ranges.weights=mse", "--out", new, "-q")
    assert run("quantize", float_folder, *same).exit_code == 0
    assert tree(out) == tree(new)


def test_quantize_takes_a_recipe_file_that_show_printed(float_folder, tmp_path):
    shown = run("recipes", "show", "minmax")
    assert shown.exit_code == 0
    assert yaml.safe_load(shown.stdout) == api.load_recipe("minmax").to_dict()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(shown.stdout)
    result = run(
        "quantize",
        float_folder,
        "--recipe",
        recipe,
        "--out",
        tmp_path / "out",
        "--steps=2",
        "--set=calibration.trajectories=1",
        "--set=ranges.weights=mse",
        "--quiet",
        "--json",
        tmp_path / "record.json",
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    _, results = checked(tmp_path / "record.json", "quantize")
    assert results["recipe"]["ranges"] == {"weights": "mse", "activations": "minmax"}


def test_sample_writes_a_grid_and_single_images(packed_folder, tmp_path):
    result = run(
        "sample",
        packed_folder,
        "--num=5",
        "--steps=2",
        "--grid",
        tmp_path / "grid.png",
        "--out",
        tmp_path / "images",
        "--batch=2",
        "--json",
        tmp_path / "record.json",
    )
    assert result.exit_code == 0, result.stderr
    arguments, results = checked(tmp_path / "record.json", "sample")
    assert (arguments["num"], arguments["batch"], arguments["seed"]) == (5, 2, 0)
    assert results["shape"] == [1, 16, 16]
    assert [Image.open(path).size for path in results["files"]] == [(16, 16)] * 5
    assert Image.open(results["grid"]).size == (2 + 3 * 34, 2 + 2 * 34)
    assert f"written to {tmp_path / 'grid.png'}" in result.stdout
    assert result.stdout.count("slower than it could be: ") == len(results["slow_paths"])


def test_the_memory_mode_changes_no_image(packed_folder, tmp_path):
    for mode in ("fast", "low"):
        where = ("--grid", tmp_path / f"{mode}.png", "--memory", mode)
        result = run("sample", packed_folder, "--num=1", "--steps=2", *where)
        assert result.exit_code == 0, result.stderr
    assert (tmp_path / "fast.png").read_bytes() == (tmp_path / "low.png").read_bytes()


@pytest.mark.parametrize("scheduler", ["own", "ddpm"])
def test_sample_takes_the_named_scheduler(float_folder, tmp_path, scheduler):
    grid = tmp_path / "grid.png"
    result = run(
        "sample",
        float_folder,
        "--num=1",
        "--steps=2",
        "--grid",
        grid,
        "--scheduler",
        scheduler,
        "--quiet",
    )
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert grid.is_file()


def test_evaluate_tells_the_distance_to_the_float_model(float_folder, packed_folder, tmp_path):
    result = run(
        "evaluate",
        packed_folder,
        "--against",
        float_folder,
        "--num=2",
        "--steps=2",
        "--json",
        tmp_path / "record.json",
    )
    assert result.exit_code == 0, result.stderr
    arguments, results = checked(tmp_path / "record.json", "evaluate")
    assert arguments["against"] == str(float_folder)
    assert (arguments["scheduler"], results["scheduler"]) == ("auto", "ddim")
    assert 10 < results["paired_psnr_db"] <= 100
    assert -1 <= results["paired_ssim"] <= 1
    assert len(results["noise_error"]) == 2
    assert "paired psnr db" in result.stdout.replace("_", " ")
    assert result.stdout.count("slower than it could be: ") == len(results["slow_paths"])


def test_bench_times_both_models(float_folder, packed_folder, tmp_path):
    result = run(
        "bench",
        packed_folder,
        "--against",
        float_folder,
        "--batch=1",
        "--batch=2",
        "--repeats=1",
        "--backend=reference",
        "--memory=low",
        "--json",
        tmp_path / "record.json",
    )
    assert result.exit_code == 0, result.stderr
    arguments, results = checked(tmp_path / "record.json", "bench")
    assert arguments["batch"] == [1, 2]
    assert [(row["batch"], row["model"]) for row in results["rows"]] == [
        (1, "float32"),
        (1, "quantized"),
        (2, "float32"),
        (2, "quantized"),
    ]
    assert set(results["kernels"]) == {"reference"}
    assert results["weights"]["memory"] == "low"
    assert results["weights"]["resident_bytes"] < results["weights"]["float32_bytes"]
    assert "weights in memory" in result.stdout
    assert "times faster" in result.stdout
    assert "the reference kernel: the backend 'reference' was chosen" in results["slow_paths"][0]
    for note in results["slow_paths"]:
        assert f"slower than it could be: {note}\n" in result.stdout


def test_sample_and_bench_take_openvino(float_folder, packed_folder, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="openvino is not installed")
    everywhere = "{pattern: '*', weight_bits: 4, activation_bits: 8}"  # w8a8 wants VNNI
    few_bits = ["--recipe=minmax", *TINY[:2], f"--set=scheme.overrides=[{everywhere}]"]
    few_bits_folder = tmp_path / "few_bits"
    result = run("quantize", float_folder, *few_bits, "--out", few_bits_folder)
    assert result.exit_code == 0, result.stderr
    grid = tmp_path / "grid.png"
    told = refused("sample", float_folder, "--grid", grid, "--backend=openvino")
    assert told.startswith("UNet2DModel has no packed layer: expected a model")
    sampled = ["--num=1", "--steps=2", "--backend=openvino", "--quiet"]
    result = run("sample", few_bits_folder, "--grid", grid, *sampled)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert grid.is_file()
    timed = ["--batch=1", "--repeats=1", "--backend=openvino:CPU"]
    result = run("bench", few_bits_folder, "--against", float_folder, *timed)
    assert result.exit_code == 0, result.stderr
    assert "OpenVINO's kernels on CPU: " in result.stdout
    assert "faster at batch 1 on this machine: " in result.stdout
    monkeypatch.setattr(openvino_export, "_saturates", lambda spec: True)
    told = refused("sample", packed_folder, "--grid", grid, "--backend=openvino")
    assert told.startswith("the layer 'conv_in' is w8a8 and this CPU has no VNNI")


def test_inspect_shows_a_float_model(float_folder, tmp_path):
    result = run(
        "inspect", float_folder, "--num=1", "--steps=2", "--json", tmp_path / "record.json"
    )
    assert result.exit_code == 0, result.stderr
    _, results = checked(tmp_path / "record.json", "inspect")
    assert results["packed"] is False
    assert all(len(row["low"]) == len(results["timesteps"]) == 2 for row in results["layers"])
    assert "plots" not in results
    assert "conv_in" in result.stdout


def test_inspect_shows_a_packed_model_and_draws_it(packed_folder, tmp_path):
    result = run(
        "inspect",
        packed_folder,
        "--plots",
        tmp_path / "plots",
        "--json",
        tmp_path / "record.json",
    )
    assert result.exit_code == 0, result.stderr
    _, results = checked(tmp_path / "record.json", "inspect")
    assert results["input_error_bypass"] is None
    assert results["packed"] is True
    assert {row["weight_bits"] for row in results["layers"]} == {4, 8}
    assert len(results["plots"]) == len(list((tmp_path / "plots").iterdir())) == 2
    assert "weight bits" in result.stdout


def test_function_and_verb_have_the_same_default_recipe():
    defaults = {
        inspect.signature(quantize).parameters["recipe"].default
        for quantize in (api.quantize, quantize_verb)
    }
    assert defaults == {"stepquant"} and defaults <= set(api.recipe_names())


def test_recipes_are_listed(tmp_path):
    result = run("recipes", "list", "--json", tmp_path / "record.json")
    assert result.exit_code == 0, result.stderr
    arguments, results = checked(tmp_path / "record.json", "recipes list")
    assert arguments == {}
    assert [row["name"] for row in results["recipes"]] == api.recipe_names()
    assert "dilatequant" in result.stdout
    shown = run("recipes", "show", "minmax", "--json", tmp_path / "record.json")
    assert shown.exit_code == 0
    arguments, results = checked(tmp_path / "record.json", "recipes show")
    assert arguments == {"name": "minmax"}
    assert results["recipe"] == api.load_recipe("minmax").to_dict()


def test_demo_prints_the_table_of_its_record(tmp_path, monkeypatch):
    def demo(out, reporter):
        out.mkdir()
        rows = [
            {"model": "float32", "psnr_db": None, "bytes": 4_000_000},
            {"model": "minmax w4a4", "psnr_db": float("inf"), "bytes": 520_000},
        ]
        return {"table": rows}

    monkeypatch.setattr(api, "demo", demo)
    result = run("demo", "--out", tmp_path / "demo", "--json", tmp_path / "record.json")
    assert result.exit_code == 0, result.stderr
    arguments, results = checked(tmp_path / "record.json", "demo")
    assert arguments == {"out": str(tmp_path / "demo")}
    assert results["table"][1]["psnr_db"] is None  # JSON has no infinity
    assert "520.00 kB" in result.stdout
    assert "minmax w4a4" in result.stdout


def test_quiet_verbs_print_nothing(float_folder, packed_folder, tmp_path):
    """In a process of its own, because libraries print to the real stderr."""
    packed, against = str(packed_folder), f"--against={float_folder}"
    commands = [
        ["sample", packed, "--num=1", "--steps=1", "--grid=grid.png"],
        ["evaluate", packed, against, "--num=2", "--steps=1"],
        ["bench", packed, against, "--batch=1", "--repeats=1"],
        ["inspect", packed],
        ["recipes", "list"],
        ["recipes", "show", "minmax"],
    ]
    script = f"""
from stepquant.cli import app
for command in {commands!r}:
    try:
        app([*command, "--quiet"])
    except SystemExit as end:
        assert end.code == 0, (command, end.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "grid.png").is_file()


def test_help_and_version():
    for arguments in (["--help"], ["quantize", "-h"], ["recipes", "--help"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.stdout
    assert run("--version").stdout.strip() == stepquant.__version__
