"""Adapters for denoisers of unknown architecture, built from their modules and a short run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepquant.calibration.trajectories import capture_trajectories
from stepquant.models.adapter import DenoiserAdapter, adapter_for
from stepquant.models.general import ModuleAdapter
from stepquant.models.inputs import Inputs
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.denoiser_pipeline import DenoiserPipeline
from stepquant.pipelines.resolved import ResolvedPipeline

SURVEY_STEPS = 2  # some samplers have no timesteps for a single step


def adapter_of(source: ResolvedPipeline) -> DenoiserAdapter:
    """Return the adapter of `source`, or the one of its denoiser's architecture.

    For a `DenoiserPipeline`, the adapter is built from a short run; see `general_adapter`.

    Raises:
        StepQuantError: the architecture is unknown, or the short run fails.
    """
    if source.adapter is not None:
        return source.adapter
    if isinstance(source.pipeline, DenoiserPipeline):
        return general_adapter(source.pipeline, *source.pipeline.patterns)
    return adapter_for(source.denoiser)


def general_adapter(
    pipeline: DiffusionPipeline,
    blocks: Sequence[str] = (),
    float_layers: Sequence[str] = (),
    *,
    prompts: str | Sequence[str] | None = None,
    labels: int | Sequence[int] | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
) -> ModuleAdapter:
    """Build an adapter for a pipeline whose denoiser has an unknown architecture.

    The function samples one image in `SURVEY_STEPS` steps. The adapter's example inputs repeat the
    first input of the denoiser. Pass the adapter to `quantize` as `adapter=`.

    Args:
        pipeline: pipeline with the denoiser.
        blocks: shell-style patterns of block names; see `ModuleAdapter`.
        float_layers: shell-style patterns of the layers that stay float; see `ModuleAdapter`.
        prompts: prompts, as in `quantize`.
        labels: class labels, as in `quantize`.
        guidance: scale of classifier-free guidance, as in `quantize`.
        call: further arguments of the pipeline, as in `quantize`.

    Raises:
        StepQuantError: the pipeline cannot be sampled with these conditions.
    """
    conditioning = Conditioning.of(prompts, labels, guidance, call)
    seen = capture_trajectories(pipeline, 1, SURVEY_STEPS, 0, None, conditioning=conditioning)

    def example(batch: int) -> Inputs:
        inputs = seen.take(torch.zeros(batch, dtype=torch.int64))
        return inputs.sample, inputs.timestep, inputs.conditions.arguments()

    return ModuleAdapter(example, blocks, float_layers)
