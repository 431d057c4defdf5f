"""Drawing images: a float or a quantized pipeline, on the backend that the caller names."""

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
    """Images of `model` (name, folder, hub id or pipeline), float32 `[num, C, H, W]` in [0, 1].

    Image `i` starts from the noise of seed `seed + i` and is of prompt, or class label, number `i`,
    over and over again; see `pipelines.sampling.sample_images`. `guidance`: scale of
    classifier-free guidance, else the pipeline's. `call`, and any other argument by name, goes to
    the pipeline. `backend`: what a packed model runs on, see `engines.backend.with_backend`.
    Several threads may sample one pipeline at once.
    """
    conditioning = Conditioning.of(prompts, labels, guidance, {**(call or {}), **more})
    pipeline = open_pipeline(model)
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
