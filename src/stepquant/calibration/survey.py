"""The adapter of a denoiser whose architecture is unknown, from its structure and a short run."""

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

SURVEY_STEPS = 2  # some samplers have no timestep for one step alone


def adapter_of(source: ResolvedPipeline) -> DenoiserAdapter:
    """The adapter that `source` has, or that of its denoiser's architecture.

    For a `DenoiserPipeline` it comes from a short run. Raises StepQuantError where there is none.
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
    """An adapter for the denoiser of a pipeline whose architecture stepquant does not know.

    Its arguments are those of the first call when one image is drawn. `blocks`, `float_layers`:
    patterns of names, see `ModuleAdapter`; the rest as in `quantize`, which takes the adapter as
    `adapter=`.
    """
    conditioning = Conditioning.of(prompts, labels, guidance, call)
    seen = capture_trajectories(pipeline, 1, SURVEY_STEPS, 0, None, conditioning=conditioning)

    def example(batch: int) -> Inputs:
        inputs = seen.take(torch.zeros(batch, dtype=torch.int64))
        return inputs.sample, inputs.timestep, inputs.conditions.arguments()

    return ModuleAdapter(example, blocks, float_layers)
