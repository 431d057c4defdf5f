"""The result of `quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.pipelines.opening import open_pipeline


@dataclass
class Quantized:
    """A quantized pipeline, the simulation it was packed from, and a record of the run.

    Attributes:
        pipeline: the quantized pipeline.
        simulation: the trainable simulation; None after a weight-only recipe.
        record: JSON values: recipe, bits, bytes, seconds, peak memory in MB, and the summary of
            each step.
    """

    pipeline: DiffusionPipeline
    simulation: nn.Module | None
    record: dict[str, Any]


class QuantizedFolder(Quantized):
    """A result in `folder`, whose pipeline is loaded at its first use.

    A weight-only recipe may write a model that would not fit in memory in float32.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.simulation, self.record = folder, None, record

    @cached_property
    def pipeline(self) -> DiffusionPipeline:  # type: ignore[override]
        """The quantized pipeline, loaded at its first use."""
        return open_pipeline(self.folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.folder}')"
