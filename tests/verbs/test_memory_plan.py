"""What a calibration will take is told before it starts, and held."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

from architectures import build
from quantize_runs import FAST, left, refused, tree
from stepquant.api import quantize
from stepquant.calibration.spill import Spill
from stepquant.calibration.trajectories import Trajectories
from stepquant.methods.recipe import load_recipe, parse_recipe
from stepquant.methods.step import Step
from stepquant.methods.training.block_training import BYTES_OF_OUTPUTS, BYTES_OF_TARGETS
from stepquant.verbs import memory_plan
from stepquant.verbs.memory_plan import (
    GIB,
    Sizes,
    plan_memory,
    predict_peak,
    sizes_of,
)

STEPS = 2
SD15 = Sizes(
    parameters=860_000_000,
    layer=29_491_200,
    block=47_500_000,
    sample=16_384,
    flow=12_000_000,
    block_flow=60_000_000,
    block_rows=12_000_000,
    skips=20_000_000,
    affine=1_200_000,
    whole_flow=600_000_000,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.second = nn.Linear(4, 3)

    def forward(self, sample, timestep):
        return self.second(self.first(sample))


def test_sizes_by_hand():
    model = Model()
    one = Trajectories(torch.ones(1, 3), torch.zeros(1), torch.zeros(1), torch.zeros(1))
    counts = {name: tensor.numel() for name, tensor in model.named_parameters()}
    found = sizes_of(model, counts, ["first", "second"], one)
    assert found == Sizes(
        parameters=16 + 15,
        layer=12,
        block=16,
        sample=3,
        flow=8,  # of the ReLU
        block_flow=7 + 8,
        block_rows=7,
        skips=4 + 3,
        affine=2 * 7,
        whole_flow=7 + 8 + 7,
    )


def recipe(**settings):
    return load_recipe("dilatequant").override(
        {"scheme.weight_bits": 4, "calibration.trajectories": 2, "calibration.steps": 4}
        | {key.replace("__", "."): value for key, value in settings.items()}
    )


def test_a_unet_of_stable_diffusion_fits_in_8_gib_if_batches_are_small():
    small = recipe(block_distillation__batch=1)
    prediction, _ = predict_peak(SD15, small, 1, GIB // 2, 8 * GIB)
    assert 3.5 * GIB < prediction.model < 4 * GIB
    assert 4.5 * GIB < prediction.peak < 8 * GIB
    large, _ = predict_peak(SD15, recipe(), 1, GIB // 2, 8 * GIB)
    assert large.peak > 8 * GIB and large.model == prediction.model


def test_data_that_do_not_fit_are_spilled_and_not_counted():
    many = recipe(block_distillation__batch=1, calibration__steps=50, calibration__trajectories=64)
    many = many.override({"calibration.batch": 1})
    roomy, threshold = predict_peak(SD15, many, 1, 0, 1000 * GIB)
    tight, lower = predict_peak(SD15, many, 1, 0, 8 * GIB)
    assert roomy.data > 40 * GIB and tight.peak <= 8 * GIB
    assert memory_plan.LEAST_SPILL <= lower < threshold


@pytest.mark.parametrize("change", ["parameters", "block", "flow", "skips", "sample"])
def test_more_of_anything_is_never_less(change):
    base, _ = predict_peak(SD15, recipe(), 1, 0, 1000 * GIB)
    larger = replace(SD15, **{change: 2 * getattr(SD15, change)})
    assert predict_peak(larger, recipe(), 1, 0, 1000 * GIB)[0].peak > base.peak


def test_biases_trained_through_the_whole_model_take_activations_and_hardly_weights():
    def peak(name, batch, sizes=SD15):
        plain = {"name": "x", "description": "", "steps": [{name: {"batch": batch}}]}
        mine = parse_recipe(plain, "x").override({"scheme.weight_bits": 4})
        return predict_peak(sizes, mine, 1, 0, 1000 * GIB)[0]

    few, many = (peak("affine_distillation", batch) for batch in (8, 16))
    assert many.forward == 2 * few.forward == 16 * 4 * 2.5 * 600_000_000
    everything = peak("trajectory_distillation", 8)
    assert everything.forward == few.forward
    assert everything.weights - few.weights == 4 * 4 * (860_000_000 - 1_200_000)


def test_a_step_that_does_nothing_takes_nothing():
    plain = {"name": "x", "steps": [{"affine_distillation": {"batch": 10**6}}], "description": ""}
    model = Model()
    one = Trajectories(torch.ones(1, 3), torch.zeros(1), torch.zeros(1), torch.zeros(1))

    def forward(scheduler):
        asked = (model, "it", parse_recipe(plain, "x"), ["first", "second"], scheduler)
        return plan_memory(*asked, lambda: one, 1000.0).prediction.forward

    assert forward(DDIMScheduler()) == 10**6 * 4 * int(2.5 * 22)
    assert forward(EulerDiscreteScheduler()) < 10**6


def test_a_step_of_another_package_needs_no_settings_that_ours_have():
    """Of one that trains blocks and has neither `batch` nor `samples`, the largest is taken."""

    class Foreign(Step):
        name = "foreign"
        trains = "blocks"

    plain = load_recipe("minmax")
    few = plain.calibration.model_copy(update={"trajectories": 4, "batch": 2})
    few = plain.model_copy(update={"calibration": few})
    foreign = few.model_copy(update={"steps": (Foreign(),)})
    without, found = (predict_peak(SD15, one, 1, 0, 64 * GIB)[0] for one in (few, foreign))
    assert found.weights > without.weights
    assert found.forward > without.forward
    assert found.data == without.data + 4 * 50 * SD15.block_rows * 4 + min(
        4 * 50 * 4 * SD15.skips, BYTES_OF_OUTPUTS + BYTES_OF_TARGETS
    )


def run(out, **changes):
    return quantize(build("sd"), "dilatequant", 4, 8, out, STEPS, FAST, prompts="a", **changes)


def test_what_does_not_fit_is_refused_before_anything_is_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.verbs.calibration_inputs.capture_trajectories", None)
    message = refused(lambda: run(tmp_path / "out", memory=0.001))
    assert message.startswith("calibrating the unet of StableDiffusionPipeline with 0.1 M param")
    assert "expected at most 0.00 GiB, the limit that was set; lower calibration.batch" in message
    assert "the memory limit is 0 GiB" in refused(lambda: run(tmp_path / "out", memory=0))
    monkeypatch.setattr(memory_plan, "available_bytes", lambda: -(10**12))
    assert "what this process holds and what is free" in refused(lambda: run(tmp_path / "out"))
    assert left(tmp_path) == []


def test_spilled_activations_give_the_same_bytes(tmp_path, monkeypatch):
    plain = run(tmp_path / "plain").record
    assert plain["predicted_peak_memory_mb"] > 0
    made = []
    empty = Spill.empty

    def spy(self, shape, dtype):
        made.append(self)
        return empty(self, shape, dtype)

    monkeypatch.setattr(Spill, "empty", spy)
    monkeypatch.setattr(memory_plan, "LEAST_SPILL", 0)
    monkeypatch.setattr(memory_plan, "SPILL_SHARE", 10**15)
    run(tmp_path / "spilled", memory=100)
    assert made and all(spill.at_least == 0 for spill in made)
    assert tree(tmp_path / "spilled") == tree(tmp_path / "plain")
