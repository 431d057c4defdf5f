"""`sample`: draw images with a float or a quantized pipeline on a chosen backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from stepquant.engines.backend import settings_kept, with_backend, with_captured_calls
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.pipelines.sampling import AUTO, sample_images
from stepquant.support.progress import Reporter


def sample(
    model: str | Path | DiffusionPipeline,
    num: int = 16,
    steps: int = 50,
    seed: int = 0,
    scheduler: str | None = AUTO,
    batch: int = 64,
    reporter: Reporter | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: int | Sequence[int] | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    backend: str = "auto",
    **more: Any,
) -> Tensor:
    """Draw images with a float or a quantized model.

    Several threads may sample one pipeline at once.

    Args:
        model: a pipeline, its folder, a safetensors file, a hub id, or "builtin:NAME".
        num: number of images.
        steps: sampling steps.
        seed: image i starts from the noise of `seed + i`.
        scheduler: name of the scheduler; "auto" chooses one, "own" keeps the pipeline's.
        batch: images sampled at a time; their noise does not depend on it.
        reporter: where progress is shown; silent by default.
        prompts: prompts, which the images take in turn.
        labels: class labels, which the images take in turn; by default all classes.
        guidance: scale of classifier-free guidance; by default the pipeline's own.
        call: further arguments of the pipeline, such as `height`.
        backend: engine or kernel of a quantized model, see `engines.backend.with_backend`.
        **more: further arguments of the pipeline, as in `call`.

    Returns:
        float32 `[num, C, H, W]` in [0, 1], on the CPU; of a pipeline for videos
        `[num, F, C, H, W]`, with F frames each.

    Raises:
        StepQuantError: a model or an argument is not as described.
    """
    conditioning = Conditioning.of(prompts, labels, guidance, {**(call or {}), **more})
    pipeline = open_pipeline(model, reporter=reporter)
    with settings_kept(denoiser_of(pipeline)):
        return sample_images(
            with_captured_calls(with_backend(pipeline, backend), conditioning.call),
            num,
            steps,
            seed,
            scheduler,
            batch,
            reporter,
            conditioning=conditioning,
        )
