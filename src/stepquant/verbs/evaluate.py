"""Quality of a pipeline beside its float one: the same seeds, the same sampler, real runtimes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepquant.calibration.trajectories import capture_trajectories, predict
from stepquant.engines.backend import with_captured_calls
from stepquant.engines.slow_paths import slow_paths
from stepquant.evaluate import (
    frechet_distance,
    frechet_distance_interval,
    load_features,
    noise_prediction_error,
    paired_psnr,
    paired_ssim,
)
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import default_features, open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.pipelines.sampling import AUTO, resolve_scheduler, sample_images
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter


def evaluate(
    model: str | Path | DiffusionPipeline,
    against: str | Path | DiffusionPipeline,
    num: int = 1024,
    steps: int = 50,
    scheduler: str | None = AUTO,
    features: str | None = None,
    seed: int = 0,
    batch: int = 64,
    images: Tensor | None = None,
    float_images: Tensor | None = None,
    reporter: Reporter | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: int | Sequence[int] | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """How far `model`'s images are from those of the float model `against`, as JSON values.

    `num` images of each at the same seeds: paired PSNR and SSIM, relative error of the noise
    prediction at each step (on the float model's own trajectories), and, where a feature network
    is named (or known for an embedded model), the Fréchet distance `fd_<features>` to the training
    data and to the float model's samples, each with a bootstrap interval. Images `[num, C, H, W]`
    that exist already can be handed over. `slow_paths` says what of `model` is slower on this
    machine than it could be. `prompts`, `labels`, `guidance`, `call`: what images are
    drawn of, as in `quantize`.
    """
    reporter = reporter or Reporter(quiet=True)
    candidate, reference = open_pipeline(model), open_pipeline(against)
    name = features or default_features(against)
    if name is not None:
        if num < 2:
            raise StepQuantError(
                f"number of images is {num}: expected at least 2 for a Fréchet distance"
            )
        load_features(name)  # a wrong name is told before the sampling
    scheduler = resolve_scheduler(reference, scheduler)
    conditioning = Conditioning.of(prompts, labels, guidance, call)
    conditioning.check(reference)
    settings = (num, steps, seed, scheduler, batch, reporter)
    if float_images is None:
        float_images = sample_images(reference, *settings, conditioning=conditioning)
    if images is None:
        drawing = with_captured_calls(candidate, conditioning.call)
        images = sample_images(drawing, *settings, conditioning=conditioning)
    record: dict[str, Any] = {
        "num": len(images),
        "steps": steps,
        "scheduler": scheduler,
        "seed": seed,
        "paired_psnr_db": paired_psnr(float_images, images),
        "paired_ssim": paired_ssim(float_images, images),
        "noise_error": noise_error(
            candidate,
            reference,
            steps,
            scheduler,
            seed,
            reporter=reporter,
            conditioning=conditioning,
        ),
        "slow_paths": slow_paths(denoiser_of(candidate)),
    }
    if name is not None:
        record.update(distances(images, float_images, name))
    return record


def distances(images: Tensor, float_images: Tensor, features: str) -> dict[str, Any]:
    """Fréchet distances of `images` to the training data and to the float model's images.

    Also the float model's own distance to the data, and the ratio of the two.
    """
    extractor = load_features(features)
    name = f"fd_{extractor.name}"
    theirs, ours = extractor(float_images), extractor(images)
    record: dict[str, Any] = {
        "features": extractor.name,
        f"{name}_to_float": frechet_distance(ours, theirs),
        f"{name}_to_float_interval": list(frechet_distance_interval(ours, theirs)),
    }
    if extractor.reference is not None:
        record[name] = frechet_distance(ours, extractor.reference)
        record[f"{name}_interval"] = list(frechet_distance_interval(ours, extractor.reference))
        record[f"{name}_of_float"] = frechet_distance(theirs, extractor.reference)
        record[f"{name}_ratio"] = record[name] / record[f"{name}_of_float"]
    return record


def class_shares(
    images: Tensor, float_images: Tensor, classes: Sequence[int], features: str
) -> dict[str, float]:
    """Shares of images that the classifier of `features` assigns to the class they were asked for.

    `classes`: one for each of `images`, and of the float model's. `top1_of_float` is the share of
    `float_images`, `top1_as_float` that of `images` with the class of their float twin. The
    classifier errs too: its card has its accuracy on real images.
    """
    if not len(images) == len(float_images) == len(classes):
        raise StepQuantError(
            f"there are {len(images)} images, {len(float_images)} of the float model and "
            f"{len(classes)} classes: expected as many of each"
        )
    extractor = load_features(features)
    asked = torch.tensor(list(classes))
    ours, theirs = extractor.classes(images), extractor.classes(float_images)
    return {
        "top1": float((ours == asked).double().mean()),
        "top1_of_float": float((theirs == asked).double().mean()),
        "top1_as_float": float((ours == theirs).double().mean()),
    }


@torch.no_grad()
def noise_error(
    candidate: DiffusionPipeline,
    reference: DiffusionPipeline,
    steps: int,
    scheduler: str | None,
    seed: int,
    num: int = 16,
    reporter: Reporter | None = None,
    conditioning: Conditioning | None = None,
) -> list[dict[str, float]]:
    """Relative squared error of the noise prediction at each step, on `num` float trajectories."""
    reporter = reporter or Reporter(quiet=True)
    trajectories = capture_trajectories(
        reference,
        num,
        steps,
        seed + 2_000_000,
        scheduler,
        reporter=reporter,
        conditioning=conditioning,
    )
    ours, theirs = denoiser_of(candidate), denoiser_of(reference)
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    with reporter.task("comparing noise predictions", total=len(trajectories.timesteps)) as task:
        for row in range(len(trajectories.timesteps)):
            inputs = trajectories.step(row)
            outputs[0].append(predict(theirs, inputs))
            outputs[1].append(predict(ours, inputs))
            task.advance()
    return [dict(error) for error in noise_prediction_error(*outputs, trajectories.timesteps)]
