"""Every part of a verb that can take long is a stage with progress."""

from __future__ import annotations

import pytest

from quantize_runs import FAST, RECONSTRUCT, SMALL
from stages import Stages
from stepquant.verbs.bench import bench
from stepquant.verbs.evaluate import evaluate
from stepquant.verbs.inspect import inspect
from stepquant.verbs.quantize import quantize
from stepquant.verbs.sample import sample


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return tiny_pipeline(**{**SMALL, "sample_size": 16})  # SSIM needs 11 x 11


@pytest.fixture(scope="module")
def folders(pipeline, tmp_path_factory):
    """A float folder and a packed one, and the stages of the run that packed it."""
    folder = tmp_path_factory.mktemp("stages")
    pipeline.save_pretrained(folder / "float")
    stages = Stages()
    settings = {**FAST, "block_distillation.batch": 8, "affine_distillation.iterations": 2}
    packed = folder / "packed"
    quantize(folder / "float", "stepquant", 4, 8, packed, 2, settings, reporter=stages)
    return folder / "float", packed, stages


def test_quantize_reports_opening_calibration_steps_packing_and_saving(folders):
    folder, packed, stages = folders
    assert list(stages.seen) == [
        f"opening {folder}",
        "checking the model and the recipe",
        "reading the float weights",
        "sampling 2 images",
        "step 1 of 3, input_error_bypass",
        "observing activations",
        "searching ranges",
        "measuring the input's errors",
        "step 2 of 3, block_distillation",
        "distilling blocks",
        "step 3 of 3, affine_distillation",
        "following steps back from the image",
        "distilling biases and norms",
        "packing layers",
        f"saving {packed}",
    ]
    stages.check_complete()


def test_training_a_block_moves_with_its_iterations(folders):
    seen = folders[2].seen["distilling blocks"]
    assert seen[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])


@pytest.mark.parametrize("activations", ["together", "after"])
def test_reconstruction_moves_forward_only(pipeline, activations):
    stages = Stages()
    recipe = "tcaq-dm"
    settings = {
        "calibration.trajectories": 2,
        **{
            key.replace("block_reconstruction", "progressive_alignment"): value
            for key, value in RECONSTRUCT.items()
        },
        "progressive_alignment.iterations": 4,
        "progressive_alignment.rounds": 1,
        "progressive_alignment.later_iterations": 4,
        "progressive_alignment.activations": activations,
    }
    quantize(pipeline, recipe, 4, 8, steps=2, settings=settings, reporter=stages)
    seen = stages.seen["reconstructing blocks"]
    half = seen[: len(seen) // 2]  # the first of two rounds
    assert half == sorted(half)
    assert stages.seen["sampling 2 images"][-1] == 2  # the second round's inputs
    stages.check_complete()


def test_sample_evaluate_inspect_and_bench_report_their_stages(folders):
    folder, packed, _ = folders
    stages = Stages()
    sample(packed, 2, 2, reporter=stages)
    assert list(stages.seen) == [f"opening {packed}", "sampling 2 images"]
    stages = Stages()
    evaluate(packed, folder, 2, 2, reporter=stages)
    assert list(stages.seen) == [
        f"opening {packed}",
        f"opening {folder}",
        "sampling 2 images",
        "measuring paired_psnr",
        "measuring paired_ssim",
        "measuring noise_error",
        "sampling 16 images",
        "comparing noise predictions",
    ]
    stages.check_complete()
    stages = Stages()
    inspect(folder, steps=2, num=2, reporter=stages)
    assert list(stages.seen) == [
        f"opening {folder}",
        "sampling 2 images",
        "observing activations",
    ]
    stages = Stages()
    bench(packed, folder, (1, 2), repeats=2, reporter=stages)
    assert stages.totals["timing"] == 2 * (3 + 2)  # warm-up rounds, too
    stages.check_complete()


def test_components_and_weight_only_runs_report_their_stages(folders, tmp_path):
    folder, _, _ = folders
    stages = Stages()
    quantize(folder, "weight-only", out=tmp_path / "out", reporter=stages)
    assert list(stages.seen) == ["copying the other components", "quantizing the component 'unet'"]
    stages.check_complete()
