from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DiTPipeline

from quantize_runs import refused
from stepquant.evaluation.metric import (
    DEFAULT,
    METRICS,
    Comparison,
    chosen_metrics,
    measure,
    register_metric,
    table_rows,
)
from stepquant.pipelines.conditioning import Conditioning
from stepquant.support.progress import Reporter

IMAGES = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def comparison(pipeline=DDPMPipeline, features=None, **conditioning):
    """Of two models that are never called."""
    model = pipeline.__new__(pipeline)
    conditions = Conditioning.of(**conditioning)
    return Comparison(model, model, 2, None, 0, conditions, Reporter(quiet=True), features)


@pytest.fixture
def brightness():
    """A metric of somebody else."""

    @register_metric("brightness", key="brightness", better="higher")
    def found(images, float_images, comparison):
        return {"brightness": float(images.mean()), "least": float(images.min())}

    yield METRICS["brightness"]
    del METRICS._entries["brightness"], METRICS._origins["brightness"]


def test_every_metric_is_found_in_its_file():
    own = {"class_shares", "frechet_distance", "noise_error", "paired_psnr", "paired_ssim"}
    assert own <= METRICS.keys()


def names(chosen):
    return [metric.name for metric in chosen]


def test_default_metrics_come_first_and_once(brightness):
    found = chosen_metrics(["brightness", "paired_psnr", "brightness"], comparison())
    assert names(found) == [*DEFAULT[:3], "brightness"]
    features = SimpleNamespace(name="fashion")
    assert names(chosen_metrics([], comparison(features=features))) == list(DEFAULT)


def test_an_unknown_metric_is_named():
    told = refused(lambda: chosen_metrics(["fid"], comparison()))
    assert told.startswith("unknown metric 'fid': expected one of ")
    assert "class_shares, frechet_distance, noise_error" in told


@pytest.mark.parametrize(
    ("name", "case", "told"),
    [
        ("frechet_distance", {}, "lacks its features: expected a feature network; name one with"),
        (
            "class_shares",
            {"features": 1},
            "lacks its labels: expected a model that draws images of",
        ),
    ],
)
def test_what_a_metric_lacks_is_told(name, case, told):
    assert f"metric '{name}' {told}" in refused(lambda: chosen_metrics([name], comparison(**case)))


def test_a_comparison_knows_the_class_of_each_image():
    model = DiTPipeline.__new__(DiTPipeline)
    model.transformer = SimpleNamespace(config={"num_embeds_ada_norm": 5})
    conditions = Conditioning.of(labels=[3, 1])
    compared = Comparison(model, model, 2, None, 0, conditions, Reporter(quiet=True))
    assert compared.labels(3) == [3, 1, 3]
    assert compared.prompts(3) is None
    assert comparison().labels(1) is None


def test_what_a_metric_finds_is_added_to_the_record(brightness):
    record = {"num": 2}
    measure([brightness], IMAGES, IMAGES, comparison(), record)
    assert record == {"num": 2, "brightness": IMAGES.mean().item(), "least": IMAGES.min().item()}
    assert brightness.cell(record) == ("brightness", record["brightness"])
    assert brightness.cell_of_float(record) is None


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"x": torch.zeros(1)}, "returned a value that JSON cannot express (Object of type Tensor"),
        (
            {"num": 1},
            "returned {'num': 1}: expected a dictionary with none of the keys that the record",
        ),
        (0.5, "returned 0.5: expected a dictionary"),
    ],
    ids=["tensor", "taken", "number"],
)
def test_what_does_not_fit_into_a_record_is_told(value, told):
    metric = SimpleNamespace(name="mine", compute=lambda *_: value)
    found = refused(lambda: measure([metric], IMAGES, IMAGES, comparison(), {"num": 2}))
    assert found.startswith(f"metric 'mine' {told}")


def test_tables_show_numbers_then_summaries():
    errors = [{"timestep": 9, "relative_mse": 0.5}, {"timestep": 0, "relative_mse": 0.25}]
    record = {"num": 2, "noise_error": errors, "paired_psnr_db": 30.0, "more": 1}
    metrics = [METRICS[name] for name in ("noise_error", "paired_psnr", "frechet_distance")]
    assert table_rows(record, metrics, ["num"]) == [
        {"measure": "paired_psnr_db", "value": 30.0, "better": "higher"},
        {"measure": "more", "value": 1, "better": ""},
        {"measure": "noise_error, mean over steps", "value": 0.375, "better": "lower"},
        {"measure": "noise_error, worst step (9)", "value": 0.5, "better": "lower"},
    ]


def test_a_table_of_models_has_a_column_for_each_metric():
    record = {"features": "fashion", "fd_fashion": 2.0, "fd_fashion_of_float": 1.0}
    metric = METRICS["frechet_distance"]
    assert metric.cell(record) == ("fd_fashion", 2.0)
    assert metric.cell_of_float(record) == 1.0
    errors = [{"timestep": 9, "relative_mse": 0.5}, {"timestep": 0, "relative_mse": 0.25}]
    assert METRICS["noise_error"].cell({"noise_error": errors}) == ("noise_error", 0.375)
    assert METRICS["paired_psnr"].cell({"paired_psnr_db": 30.0}) == ("psnr_db", 30.0)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("Bright", {}, "the name of a metric is 'Bright'"),
        ("bright", {"better": "more"}, "has better='more'"),
        ("bright", {"needs": ("captions",)}, "needs=('captions',)"),
        ("paired_psnr", {}, "has the name of stepquant.evaluation.metrics.paired.psnr"),
    ],
)
def test_a_metric_that_is_not_as_described_is_refused(name, changes, told):
    decorate = {"key": "bright", "better": "lower", **changes}
    assert told in refused(lambda: register_metric(name, **decorate)(lambda *_: {}))
