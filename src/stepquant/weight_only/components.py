"""Components of a pipeline beside the denoiser, with few-bit weights where they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.pipelines.opening import float32_bytes, weight_file_bytes
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.weight_only.quantizers import quantize_weights

WAYS = {"w8": 8, "w4": 4}


def check_components(
    pipeline: DiffusionPipeline, denoiser: str, components: Mapping[str, str]
) -> None:
    """An error for a component that is not there, is the denoiser, or a way that is not known."""
    for name, way in components.items():
        others = [
            key
            for key, part in vars(pipeline).items()
            if isinstance(part, nn.Module) and key != denoiser
        ]
        if name not in others:
            hint = "; the recipe says its bits" if name == denoiser else ""
            raise StepQuantError(
                f"the component '{name}' of {type(pipeline).__name__} is to have its weights "
                f"quantized: expected one of {', '.join(others) or 'none'}{hint}"
            )
        if way not in WAYS:
            raise StepQuantError(
                f"the component '{name}' is to be {way!r}: expected one of {', '.join(WAYS)}, "
                "weights of so many bits that are dequantized on use"
            )


def quantize_components(
    pipeline: DiffusionPipeline, components: Mapping[str, str], reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Replace each component in `pipeline` by a copy with weights of few bits; a record of each."""
    records = {}
    for name, way in components.items():
        part = getattr(pipeline, name)
        size = float32_bytes(part)
        part = copy.deepcopy(part)
        grids = "minmax" if WAYS[way] < 8 else None
        with reporter.task(f"packing the component '{name}'", total=None):
            quantize_weights(part, f"the component '{name}'", WAYS[way], grids)
        pipeline.register_modules(**{name: part})
        layers = sum(isinstance(module, WeightOnly) for module in part.modules())
        records[name] = {"bits": way, "layers": layers, "float32_bytes": size}
    return records


def add_file_sizes(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """Put into each record what its component takes on disk."""
    for name, record in records.items():
        record["checkpoint_bytes"] = weight_file_bytes(folder, name)
