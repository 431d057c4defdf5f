"""Weight-only quantization of a pipeline on disk, a few layers in memory at a time."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from stepquant.calibration.initialize import weight_search
from stepquant.checkpoint.folder import check_folder, read_components
from stepquant.checkpoint.load import is_single_file, local_folder
from stepquant.checkpoint.save import new_checkpoint
from stepquant.models.adapter import ADAPTERS
from stepquant.pipelines.opening import resolve_builtin, weight_file_bytes
from stepquant.pipelines.resolved import DENOISERS
from stepquant.runtime.layers.weight_only import check_weight_only_bits
from stepquant.support.atomic import remove_partial
from stepquant.support.errors import StepQuantError
from stepquant.support.process_memory import peak_memory_mb, reset_peak_memory
from stepquant.support.progress import Reporter
from stepquant.weight_only.components import WAYS
from stepquant.weight_only.streaming import stream_weights

GRIDS = ("minmax", "mse")


def pack(
    model: str | Path,
    out: str | Path,
    weights: int = 4,
    grids: str = "minmax",
    components: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Deprecated: call `quantize(model, "weight-only", weights=..., out=...).record`.

    `grids` became the setting `ranges.weights`. The other arguments are those of `convert`.
    """
    warnings.warn(
        "stepquant.api.pack is deprecated and will be removed in the next release: call "
        f"quantize(model, 'weight-only', weights={weights!r}, out=...), where grids is the setting "
        "'ranges.weights'",
        DeprecationWarning,
        stacklevel=2,
    )
    return convert(model, out, weights, grids, components, reporter)


def convert(
    model: str | Path,
    out: str | Path,
    weights: int = 4,
    grids: str = "minmax",
    components: Mapping[str, str] | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Quantize the weights of a pipeline without calibration and write it as a new folder.

    Activations stay float, so the model becomes smaller, not faster. The function reads the
    safetensors files one layer at a time and writes shards, so a model may be far larger than the
    memory. The input and output layers of the denoiser stay float if its architecture is known.

    Args:
        model: a diffusers folder, a hub id or "builtin:NAME".
        out: the new folder; it appears complete or not at all.
        weights: bits of the denoiser's weights, 8 or 4.
        grids: search for the grids of 4-bit weights: "minmax", or "mse", which minimizes
            |error|^2.4 of the weights. "mse" is many times slower and does not always give better
            images.
        components: "w8" or "w4" for other models of diffusers in the pipeline, such as
            `{"vae": "w8"}`. The rest is copied.
        reporter: where progress is shown; silent by default.

    Returns:
        A record of JSON values: sizes in bytes of the denoiser, seconds, peak memory in MB, and an
        entry for each quantized component.

    Raises:
        StepQuantError: the model, a component or a setting is not as described, `out` exists, or a
            weight is not finite.
    """
    reporter = reporter or Reporter(quiet=True)
    check_weight_only_bits(weights, "bits of the denoiser's weights")
    if grids not in GRIDS:
        raise StepQuantError(f"grids is {grids!r}: expected one of {', '.join(GRIDS)}")
    target = Path(out)
    remove_partial(target)
    source = resolve_builtin(model)
    if is_single_file(source):
        raise StepQuantError(
            f"'{source}' is a single file: expected a diffusers pipeline folder or a hub id, whose "
            "tensor names are those of the model; load the file and save it as a folder"
        )
    folder = local_folder(source)
    check_folder(folder)
    index = read_components(folder)
    denoiser = next((name for name in DENOISERS if name in index), None)
    if denoiser is None:
        raise StepQuantError(
            f"'{folder}' has the components {', '.join(index)}: expected a denoiser called "
            f"{' or '.join(DENOISERS)}"
        )
    ways = {denoiser: f"w{weights}", **_checked(folder, index, denoiser, components or {})}
    reset_peak_memory()
    started = time.monotonic()
    records: dict[str, Any] = {}
    with new_checkpoint(target) as partial_folder:
        chosen = {str(folder / name) for name in ways}

        def left_out(parent: str, names: list[str]) -> list[str]:
            return [name for name in names if str(Path(parent) / name) in chosen]

        shutil.copytree(folder, partial_folder, ignore=left_out, dirs_exist_ok=True)
        for name, way in ways.items():
            kept = partial(_outer_layers, reporter) if name == denoiser else lambda _: ()
            records[name] = _quantize_one(
                folder / name, partial_folder / name, way, grids, kept, reporter
            )
    return {
        "denoiser": denoiser,
        "bits": ways[denoiser],
        "grids": grids if weights < 8 else None,
        "components": records,
        "float32_bytes": records[denoiser]["float32_bytes"],
        "checkpoint_bytes": records[denoiser]["checkpoint_bytes"],
        "times_smaller": records[denoiser]["float32_bytes"] / records[denoiser]["checkpoint_bytes"],
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }


def _checked(
    folder: Path, index: Mapping[str, Any], denoiser: str, components: Mapping[str, str]
) -> Mapping[str, str]:
    models = [
        key
        for key, entry in index.items()
        if entry[0] == "diffusers" and (folder / key / "config.json").is_file()
    ]
    others = [key for key in models if key != denoiser]
    for name, way in components.items():
        if name not in others:
            raise StepQuantError(
                f"the component '{name}' cannot be quantized: expected one of "
                f"{', '.join(others) or 'none'}, the models of diffusers other than the denoiser"
            )
        if way not in WAYS:
            raise StepQuantError(
                f"the component '{name}' is set to {way!r}: expected one of {', '.join(WAYS)}"
            )
    return components


def _quantize_one(
    source: Path, target: Path, way: str, grids: str, kept: Any, reporter: Reporter
) -> dict[str, Any]:
    """Quantize the component in `source` into `target`, and return its record."""
    bits = WAYS[way]
    found = stream_weights(
        source,
        target,
        f"the component '{source.name}'",
        bits,
        grids if bits < 8 else None,
        weight_search(grids),
        kept,
        reporter,
    )
    return {
        "bits": way,
        **found,
        "stored_bytes": weight_file_bytes(source.parent, source.name),
        "float32_bytes": 4 * found["parameters"],
        "checkpoint_bytes": weight_file_bytes(target.parent, target.name),
    }


def _outer_layers(reporter: Reporter, model: nn.Module) -> Collection[str]:
    """Return the names of the input and output layers; none for an unknown architecture."""
    adapter = ADAPTERS.get(type(model).__name__)
    if adapter is None:
        reporter.line(
            f"the architecture {type(model).__name__} is unknown, so its input and output layers "
            "are quantized like all others"
        )
        return ()
    return adapter.input_output_layers(model)
