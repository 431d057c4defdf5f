"""`quantize` by a weight-only recipe, which streams the model's files without calibration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from stepquant.methods.recipe import WeightOnlyRecipe
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.verbs.quantized import QuantizedFolder
from stepquant.weight_only.conversion import convert


def check_unused(recipe: WeightOnlyRecipe, unused: Mapping[str, Any]) -> None:
    """Refuse arguments of `quantize` that a weight-only recipe does not use.

    Raises:
        StepQuantError: one of `unused`, values by argument name, was given.
    """
    given = [name for name, value in unused.items() if not _is_absent(value)]
    if given:
        raise StepQuantError(
            f"the recipe '{recipe.name}' got {', '.join(given)}: expected weights, out, components "
            "and the settings scheme.weight_bits and ranges.weights only, because a weight-only "
            "recipe calibrates nothing; leave the others out"
        )


def _is_absent(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def quantize_weight_only(
    model: str | Path | DiffusionPipeline,
    recipe: WeightOnlyRecipe,
    out: str | Path | None,
    components: Mapping[str, str] | None,
    reporter: Reporter | None,
) -> QuantizedFolder:
    """Quantize the weights of a pipeline's denoiser and write the new folder `out`.

    Raises:
        StepQuantError: `model` is an open pipeline, which has no files to stream, `out` is None, or
            `weight_only.conversion.convert` refuses an argument.
    """
    if isinstance(model, DiffusionPipeline):
        raise StepQuantError(
            f"the recipe '{recipe.name}' got an open {type(model).__name__}: expected a folder or "
            "a hub id, whose files it reads layer by layer; save the pipeline first, or load it "
            "with WeightOnlyConfig"
        )
    if out is None:
        raise StepQuantError(
            f"the recipe '{recipe.name}' got no out: expected the name of a new folder, because it "
            "writes layer by layer"
        )
    record = convert(
        model, out, recipe.scheme.weight_bits, recipe.ranges.weights, components, reporter
    )
    return QuantizedFolder(Path(out), {"recipe": recipe.to_dict(), **record})
