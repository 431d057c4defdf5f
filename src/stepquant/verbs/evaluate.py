"""Quality of a pipeline beside its float one: the same seeds, the same sampler, real runtimes."""

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
    """How far `model`'s images are from those of the float model `against`, as JSON values.

    `num` images of each at the same seeds: paired PSNR and SSIM, relative error of the noise
    prediction at each step (on the float model's own trajectories), and, where a feature network
    is named (or known for an embedded model), the Fréchet distance `fd_<features>` to the training
    data and to the float model's samples, each with a bootstrap interval. `metrics` names others
    to compute as well, such as those of installed plug-ins. Images `[num, C, H, W]` that exist
    already can be handed over. `slow_paths` says what of `model` is slower on this machine than it
    could be. `prompts`, `labels`, `guidance`, `call`: what images are drawn of, as in `quantize`.
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
    # An unknown metric is refused before the sampling.
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
