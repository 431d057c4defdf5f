from __future__ import annotations

import json
import math

import pytest
import torch

from stepquant.evaluation import load_features, register_metric
from stepquant.evaluation.metric import METRICS
from stepquant.evaluation.metrics.class_shares import class_shares
from stepquant.evaluation.metrics.frechet import distances
from stepquant.evaluation.metrics.noise_error import noise_error
from stepquant.pipelines.sampling import sample_images
from stepquant.support.errors import StepQuantError
from stepquant.verbs.evaluate import evaluate
from stepquant.verbs.quantize import quantize

# So few images cannot have a covariance of full rank: the distances warn, which is tested
# where they are.
pytestmark = pytest.mark.filterwarnings("ignore:.*biased upwards:UserWarning")
FEW = {"num": 4, "steps": 2, "batch": 4}
KEYS = {
    "slow_paths",
    "num",
    "steps",
    "scheduler",
    "seed",
    "paired_psnr_db",
    "paired_ssim",
    "noise_error",
}


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    """Images of 32 x 32 pixels, as the embedded features take them."""
    return tiny_pipeline(sample_size=32)


@pytest.fixture(scope="module")
def coarse(pipeline):
    settings = {"calibration.trajectories": 1}
    return quantize(pipeline, "minmax", 3, 4, steps=2, settings=settings).pipeline


def numbers(value):
    if isinstance(value, dict):
        return [number for entry in value.values() for number in numbers(entry)]
    if isinstance(value, list):
        return [number for entry in value for number in numbers(entry)]
    return [value] if isinstance(value, int | float) else []


@pytest.fixture(scope="module")
def of_itself(pipeline):
    return evaluate(pipeline, pipeline, features="fashion", seed=3, **FEW)


@pytest.fixture(scope="module")
def of_coarse(coarse, pipeline):
    return evaluate(coarse, pipeline, features="fashion", seed=3, **FEW)


def test_a_model_beside_itself_is_perfect(of_itself):
    assert of_itself["paired_psnr_db"] == 100.0
    assert of_itself["paired_ssim"] == pytest.approx(1.0, abs=1e-6)
    assert [row["relative_mse"] for row in of_itself["noise_error"]] == [0.0, 0.0]
    assert of_itself["fd_fashion_to_float"] == pytest.approx(0.0, abs=1e-6)
    assert of_itself["fd_fashion"] == of_itself["fd_fashion_of_float"] > 0
    assert of_itself["fd_fashion_ratio"] == 1.0


def test_a_coarse_model_is_told_from_the_float_one(of_coarse):
    assert of_coarse["paired_psnr_db"] < 60
    assert of_coarse["paired_ssim"] < 1
    assert of_coarse["fd_fashion_to_float"] > 1e-6
    assert all(0 < row["relative_mse"] < 10 for row in of_coarse["noise_error"])


def test_a_record_has_its_settings_and_finite_numbers(of_itself, of_coarse):
    fd = {"fd_fashion", "fd_fashion_interval", "fd_fashion_of_float", "fd_fashion_ratio"}
    fd |= {"features", "fd_fashion_to_float", "fd_fashion_to_float_interval"}
    for record in (of_itself, of_coarse):
        assert record.keys() == KEYS | fd
        assert all(math.isfinite(number) for number in numbers(record))
        assert json.loads(json.dumps(record, allow_nan=False)) == record
        assert (record["num"], record["steps"], record["seed"]) == (4, 2, 3)
        assert (record["scheduler"], record["features"]) == ("ddim", "fashion")
        assert [row["timestep"] for row in record["noise_error"]] == [500, 0]
        for name in ("fd_fashion", "fd_fashion_to_float"):
            low, high = record[f"{name}_interval"]
            assert 0 <= low <= record[name] <= high


def test_without_features_there_is_no_distance(pipeline):
    record = evaluate(pipeline, pipeline, **FEW)
    assert record.keys() == KEYS


def test_images_at_hand_are_not_sampled_again(pipeline, monkeypatch):
    drawn = []
    monkeypatch.setattr("stepquant.verbs.evaluate.sample_images", lambda *args: drawn.append(args))
    monkeypatch.setattr(
        "stepquant.evaluation.metrics.noise_error.noise_error", lambda *args, **kwargs: []
    )
    torch.manual_seed(0)
    images = torch.rand(4, 1, 32, 32)
    record = evaluate(pipeline, pipeline, images=images, float_images=images, **FEW)
    assert drawn == []
    assert record["paired_psnr_db"] == 100.0


def test_unknown_features_are_told_before_anything_is_sampled(pipeline, monkeypatch):
    monkeypatch.setattr("stepquant.verbs.evaluate.sample_images", None)
    with pytest.raises(StepQuantError, match="features 'inception' were not found"):
        evaluate(pipeline, pipeline, features="inception", **FEW)


def test_no_images_are_refused(pipeline):
    with pytest.raises(StepQuantError, match="number of images is 0"):
        evaluate(pipeline, pipeline, **{**FEW, "num": 0})


def test_noise_is_compared_on_the_float_models_own_inputs(pipeline, coarse, monkeypatch):
    seen = {"float": [], "coarse": []}
    handles = [
        model.register_forward_pre_hook(
            lambda _m, args, kwargs, key=key: seen[key].append(args[0].clone()), with_kwargs=True
        )
        for key, model in (("float", pipeline.unet), ("coarse", coarse.unet))
    ]
    errors = noise_error(coarse, pipeline, 2, "ddim", 0, num=3)
    for handle in handles:
        handle.remove()
    assert [row["timestep"] for row in errors] == [500, 0]
    assert len(seen["coarse"]) == 2
    # The float model is called for the trajectories first, then for the comparison.
    for ours, theirs in zip(seen["coarse"], seen["float"][-2:], strict=True):
        assert torch.equal(ours, theirs)
    for index, row in enumerate(errors):
        timestep = torch.tensor(row["timestep"])
        with torch.no_grad():
            target = pipeline.unet(seen["coarse"][index], timestep).sample.double()
            found = coarse.unet(seen["coarse"][index], timestep).sample.double()
        expected = (found - target).square().mean() / target.square().mean()
        assert row["relative_mse"] == pytest.approx(expected.item(), rel=1e-4)


def test_distances_are_between_the_features_of_the_images(pipeline):
    ours = sample_images(pipeline, 3, 2, seed=0)
    theirs = sample_images(pipeline, 3, 2, seed=50)
    record = distances(ours, theirs, "fashion")
    again = distances(theirs, ours, "fashion")
    assert record["fd_fashion_to_float"] == pytest.approx(again["fd_fashion_to_float"], rel=1e-3)
    assert record["fd_fashion"] == pytest.approx(again["fd_fashion_of_float"])
    assert load_features("fashion").num_features == 64


@pytest.fixture
def pictures():
    """Seven random pictures and the classes that the shipped classifier takes them for."""
    images = torch.rand(7, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    images *= torch.linspace(0, 1, 7).view(-1, 1, 1, 1)
    return images, load_features("fashion").classes(images).tolist()


def test_shares_of_classes(pictures):
    images, classes = pictures
    assert len(set(classes)) > 1
    shares = class_shares(images, images, classes, "fashion")
    assert shares == {"top1": 1.0, "top1_of_float": 1.0, "top1_as_float": 1.0}
    wrong = [(classes[0] + 1) % 10, *classes[1:]]
    assert class_shares(images, images, wrong, "fashion")["top1"] == pytest.approx(6 / 7)


def test_a_share_is_of_the_candidates_images(pictures):
    images, classes = pictures
    constant = images[:1].expand(7, 1, 32, 32)
    share = classes.count(classes[0]) / 7
    shares = class_shares(constant, images, classes, "fashion")
    assert shares["top1_of_float"] == 1.0
    assert shares["top1"] == shares["top1_as_float"] == pytest.approx(share)


def test_a_class_for_each_image_is_needed(pictures):
    images, classes = pictures
    with pytest.raises(StepQuantError, match="7 images, 7 of the float model and 6 classes"):
        class_shares(images, images, classes[:6], "fashion")


def test_a_metric_that_is_named_is_computed_as_well(pipeline):
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    given = {"images": images, "float_images": images, "features": "fashion", **FEW}

    @register_metric("widest", key="widest_gap", better="lower", needs=("features",))
    def widest(images, float_images, comparison):
        assert comparison.candidate is comparison.reference is pipeline
        return {"widest_gap": float((images - float_images).abs().max())}

    try:
        record = evaluate(pipeline, pipeline, metrics="widest", **given)
    finally:
        del METRICS._entries["widest"], METRICS._origins["widest"]
    assert list(record)[-1] == "widest_gap" and record["widest_gap"] == 0.0
    assert record.keys() - {"widest_gap"} == evaluate(pipeline, pipeline, **given).keys()


def test_an_unknown_metric_is_told_before_anything_is_sampled(pipeline, monkeypatch):
    monkeypatch.setattr("stepquant.verbs.evaluate.sample_images", None)
    with pytest.raises(StepQuantError, match="unknown metric 'fid': expected one of "):
        evaluate(pipeline, pipeline, metrics=["fid"], **FEW)
