"""Quality of a quantized pipeline against its float one: same seeds, same sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from stepquant.engines.backend import with_captured_calls
from stepquant.engines.slow_paths import slow_paths
from stepquant.evaluation.features import load_features
from stepquant.evaluation.metric import Comparison, chosen_metrics, measure
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
    metrics: str | Sequence[str] = (),
) -> dict[str, Any]:
    """Compare images of `model` with those of the float model `against` from the same seeds.

    The default metrics are paired PSNR and SSIM, the relative error of the noise prediction at each
    sampling step (on the float model's trajectories), and, with a feature network, the Fréchet
    distance `fd_<features>` to the training data and to the float model's images, each with a
    bootstrap interval.

    Args:
        model: the pipeline to evaluate, its folder, or a hub id.
        against: the float pipeline, its folder, a hub id, or "builtin:NAME".
        num: images sampled with each model; image i starts from the noise of `seed + i`.
        steps: sampling steps.
        scheduler: name of the scheduler; "auto" chooses one, "own" keeps the pipeline's.
        features: name or folder of a feature network; by default that of an embedded model.
        seed: seed of the first image.
        batch: images sampled at a time.
        images: images `[num, C, H, W]` in [0, 1] of `model`, if they exist already.
        float_images: the same of `against`.
        reporter: where progress is shown; silent by default.
        prompts: prompts of the images, as in `quantize`.
        labels: class labels of the images, as in `quantize`.
        guidance: scale of classifier-free guidance, as in `quantize`.
        call: further arguments of the pipeline, as in `quantize`.
        metrics: names of additional metrics, such as those of installed plug-ins.

    Returns:
        JSON values: the settings, the values of each metric under its keys, and `slow_paths`, the
        fallbacks of `model` that are slow on this machine.

    Raises:
        StepQuantError: a model or an argument is not as described, or a metric lacks its inputs.
    """
    reporter = reporter or Reporter(quiet=True)
    candidate, reference = (open_pipeline(each, reporter=reporter) for each in (model, against))
    name = features or default_features(against)
    if name is not None and num < 2:
        raise StepQuantError(
            f"number of images is {num}: expected at least 2 for a Fréchet distance"
        )
    extractor = None if name is None else load_features(name)
    scheduler = resolve_scheduler(reference, scheduler)
    conditioning = Conditioning.of(prompts, labels, guidance, call)
    conditioning.check(reference)
    comparison = Comparison(
        candidate, reference, steps, scheduler, seed, conditioning, reporter, extractor
    )
    # Refuse an unknown metric before sampling.
    chosen = chosen_metrics([metrics] if isinstance(metrics, str) else metrics, comparison)
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
    }
    plain = [metric for metric in chosen if "features" not in metric.needs]
    measure(plain, images, float_images, comparison, record)
    record["slow_paths"] = slow_paths(denoiser_of(candidate))
    of_features = [metric for metric in chosen if metric not in plain]
    measure(of_features, images, float_images, comparison, record)
    return record
