"""Weight-only quantization of a pipeline's components other than the denoiser."""

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
    """Check `components`, a mapping such as `{"vae": "w8"}`, against `pipeline`.

    Raises:
        StepQuantError: a name is not that of a model in the pipeline or is the denoiser's, or its
            value is neither "w8" nor "w4".
    """
    for name, way in components.items():
        others = [
            key
            for key, part in vars(pipeline).items()
            if isinstance(part, nn.Module) and key != denoiser
        ]
        if name not in others:
            hint = "; the recipe sets its bits" if name == denoiser else ""
            raise StepQuantError(
                f"the component '{name}' of {type(pipeline).__name__} cannot be quantized: "
                f"expected one of {', '.join(others) or 'none'}{hint}"
            )
        if way not in tuple(WAYS):
            raise StepQuantError(
                f"the component '{name}' is set to {way!r}: expected one of {', '.join(WAYS)}, the "
                "bits of its weights, which are dequantized on use"
            )


def quantize_components(
    pipeline: DiffusionPipeline, components: Mapping[str, str], reporter: Reporter
) -> dict[str, dict[str, Any]]:
    """Replace components of `pipeline` by copies with 8-bit or 4-bit weights.

    Args:
        pipeline: changed in place; the original components are not.
        components: "w8" or "w4" by component name, as `check_components` accepts them.
        reporter: shows each component as a stage.

    Returns:
        For each component `bits` ("w8" or "w4"), `layers` (number of quantized layers) and
        `float32_bytes`.

    Raises:
        StepQuantError: a component has no layer to quantize, is quantized already, or is not a
            model of diffusers or transformers.
    """
    records = {}
    for name, way in components.items():
        part = getattr(pipeline, name)
        size = float32_bytes(part)
        part = copy.deepcopy(part)
        grids = "minmax" if WAYS[way] < 8 else None
        with reporter.task(f"quantizing the component '{name}'", total=None):
            quantize_weights(part, f"the component '{name}'", WAYS[way], grids)
        pipeline.register_modules(**{name: part})
        layers = sum(isinstance(module, WeightOnly) for module in part.modules())
        records[name] = {"bits": way, "layers": layers, "float32_bytes": size}
    return records


def add_file_sizes(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """Add `checkpoint_bytes`, the size of the component's files in `folder`, to each record."""
    for name, record in records.items():
        record["checkpoint_bytes"] = weight_file_bytes(folder, name)
