"""`quantize` by the recipe weight-only, and what the other verbs do with the result."""

from __future__ import annotations

import json

import pytest
import torch

from architectures import build
from quantize_runs import left, refused, tree
from stepquant.api import bench, evaluate, inspect, load, load_recipe, quantize, sample
from stepquant.methods.recipe import WeightOnlyRecipe
from stepquant.runtime.layers.integer import is_packed
from stepquant.runtime.layers.resident import weight_bytes_resident
from stepquant.verbs import quantized
from stepquant.weight_only.conversion import convert

PROMPT = {"prompts": "a"}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "float"
    build("sd").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def w4(float_folder):
    return quantize(float_folder, "weight-only", out=float_folder.with_name("w4"))


@pytest.mark.parametrize(
    ("weights", "settings", "grids"),
    [(8, None, "minmax"), (4, None, "minmax"), (None, {"ranges.weights": "mse"}, "mse")],
)
def test_the_bytes_are_those_of_the_conversion(float_folder, tmp_path, weights, settings, grids):
    result = quantize(
        float_folder,
        "weight-only",
        weights,
        out=tmp_path / "out",
        settings=settings,
        components={"vae": "w8"},
    )
    converted = convert(float_folder, tmp_path / "it", weights or 4, grids, {"vae": "w8"})
    assert tree(tmp_path / "out") == tree(tmp_path / "it")
    assert left(tmp_path) == ["it", "out"]
    record = dict(result.record)
    recipe = record.pop("recipe")
    assert recipe["scheme"] == {"weight_bits": weights or 4}
    assert recipe["ranges"] == {"weights": grids}
    assert record.keys() == converted.keys()
    assert record["components"] == converted["components"]
    assert json.loads(json.dumps(result.record, allow_nan=False)) == result.record


def test_the_pipeline_is_loaded_when_it_is_asked_for(float_folder, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(quantized, "open_pipeline", lambda folder: opened.append(folder) or "it")
    result = quantize(float_folder, "weight-only", out=tmp_path / "out")
    assert result.simulation is None and str(tmp_path) in repr(result)
    assert opened == []
    assert result.pipeline == result.pipeline == "it"
    assert opened == [tmp_path / "out"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"activations": 8}, "got activations: expected weights, out, components and the settings"),
        ({"steps": 20, "prompts": "a"}, "got steps, prompts: expected"),
        ({"labels": 0}, "got labels: expected"),
        ({"guidance": 0.0, "call": {"height": 64}}, "got guidance, call: expected"),
        ({"seed": 1, "resume": True, "memory": 4.0}, "got seed, resume, memory: expected"),
        (
            {"settings": {"calibration.steps": 3}},
            "has no setting 'calibration.steps': expected",
        ),
        ({"settings": {"scheme.activation_bits": 8}}, "no setting 'scheme.activation_bits'"),
        ({"settings": {"ranges.weights": "best"}}, "key 'ranges.weights' is 'best'"),
        ({"weights": 3}, "weight_bits of a weight-only recipe is 3: expected one of 4, 8"),
        ({"out": None}, "got no out: expected the name of a new folder"),
        (
            {"components": {"text_encoder": "w8"}},
            "'text_encoder' cannot be quantized: expected one",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_weight_only_recipe_cannot_take_is_refused(float_folder, tmp_path, given, words):
    more = {"out": tmp_path / "out", **given}
    message = refused(lambda: quantize(float_folder, "weight-only", **more))
    assert words in message
    assert left(tmp_path) == []


def test_an_open_pipeline_has_no_files_to_stream(tmp_path):
    message = refused(lambda: quantize(build("sd"), "weight-only", out=tmp_path / "out"))
    assert "got an open StableDiffusionPipeline: expected a folder or a hub id" in message


def test_a_recipe_of_ones_own_is_a_file(float_folder, tmp_path):
    path = tmp_path / "mine.yaml"
    mine = load_recipe("weight-only").override({"scheme.weight_bits": 8})
    path.write_text(mine.to_yaml())
    assert load_recipe(path) == mine and isinstance(mine, WeightOnlyRecipe)
    assert quantize(float_folder, path, out=tmp_path / "out").record["bits"] == "w8"
    path.write_text(mine.to_yaml() + "steps: []\n")
    assert "unknown key 'steps', expected one of name, description, kind" in refused(
        lambda: load_recipe(path)
    )
    path.write_text(mine.to_yaml().replace("weight_bits: 8", "activation_bits: 8"))
    assert "unknown key 'scheme.activation_bits', expected one of weight_bits" in refused(
        lambda: load_recipe(path)
    )


def test_bench_times_it_and_says_its_kind(w4, float_folder):
    record = bench(w4.pipeline, float_folder, batch=(1,), repeats=1)
    assert record["kind"] == "weight-only"
    assert record["kernels"] == {} and record["openvino"] is None and record["slow_paths"] == []
    assert [row["model"] for row in record["rows"]] == ["float32", "quantized"]
    found = weight_bytes_resident(w4.pipeline.unet)
    assert record["weights"]["resident_bytes"] == found.resident
    assert 4 < record["weights"]["times_smaller"] < 8
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert not is_packed(w4.pipeline.unet)


@pytest.mark.parametrize("given", [{"backend": "native"}, {"memory": "low"}])
def test_bench_has_no_backends_or_memory_modes_for_it(w4, float_folder, given):
    message = refused(lambda: bench(w4.pipeline, float_folder, batch=(1,), repeats=1, **given))
    assert "whose layers are weight-only: expected auto and fast" in message


def test_it_is_no_float_model_to_compare_with(w4):
    message = refused(lambda: bench(w4.pipeline, w4.folder, batch=(1,), repeats=1))
    assert "is quantized: expected the float model to compare with" in message


def test_inspect_shows_bits_and_bytes(w4, tmp_path):
    record = inspect(w4.folder)
    assert (record["packed"], record["kind"], record["timesteps"]) == (True, "weight-only", [])
    assert record["float_layers"] == ["conv_in", "conv_out"]
    assert len(record["layers"]) == w4.record["components"]["unet"]["layers"]
    for row in record["layers"]:
        assert row["weight_bits"] == 4 and row["float32_bytes"] == 8 * row["packed_bytes"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    message = refused(lambda: inspect(w4.folder, plots=tmp_path / "plots"))
    assert "has no step tables to plot" in message and left(tmp_path) == []


def test_evaluate_and_sample_take_it(w4, float_folder):
    record = evaluate(w4.folder, float_folder, 1, 2, **PROMPT)
    assert record["paired_psnr_db"] > 10 and len(record["noise_error"]) == 2
    images = sample(w4.folder, 1, 2, **PROMPT)
    assert torch.equal(images, sample(load(w4.folder), 1, 2, **PROMPT))
