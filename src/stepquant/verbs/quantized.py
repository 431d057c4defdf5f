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
    """A packed pipeline, the simulation it was packed from, and the record of the run.

    `record` holds plain JSON values: recipe, bits, bytes, seconds, peak memory, and the report of
    each step. `simulation` is None for a weight-only recipe, which simulates nothing.
    """

    pipeline: DiffusionPipeline
    simulation: nn.Module | None
    record: dict[str, Any]


class QuantizedFolder(Quantized):
    """The result in `folder`, whose pipeline is loaded when it is first asked for.

    A weight-only recipe may write a model that does not fit in memory in float32.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.simulation, self.record = folder, None, record

    @cached_property
    def pipeline(self) -> DiffusionPipeline:  # type: ignore[override]
        """The quantized pipeline."""
        return open_pipeline(self.folder)

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{self.folder}')"
