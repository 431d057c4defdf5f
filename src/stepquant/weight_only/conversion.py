"""Quantizing a pipeline's weights without calibration and without holding a model in memory."""

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
from stepquant.pipelines.resolved import DENOISERS, other_denoisers
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
    """Deprecated name of `quantize(model, "weight-only", weights=..., out=...).record`.

    `grids` is the setting `ranges.weights` there; the rest is as in `convert`.
    """
    warnings.warn(
        "stepquant.api.pack is deprecated, and will be gone in the next release: call "
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
    modules_to_not_convert: Collection[str] = (),
) -> dict[str, Any]:
    """Write `model` with weights of few bits, dequantized on use, as the new folder `out`.

    No data, no calibration, float activations: smaller, not faster. Weights are read from the
    safetensors of the folder or hub id `model` one layer at a time and written in shards, so that a
    model far larger than the memory can be quantized. `weights`: 8, or 4, of the denoiser, whose
    input and output layers stay float. `grids` of 4 bits: "minmax", or "mse" (the least
    |error|^2.4 of the weights: many times slower, and not always better pictures). A pipeline's
    other denoisers (`transformer_2`) are quantized like the first. `components`: others, models of
    diffusers, as `{"vae": "w8"}`; the rest is copied. `modules_to_not_convert`:
    names or patterns of the denoiser's modules whose layers stay float. Gives a record: bytes,
    seconds, peak memory, and each component's own.

    Raises StepQuantError for anything in the input that is not as expected.
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
            "names of tensors are those of the model; load the file, and save it as a folder"
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
    kinds = {name: entry[1] for name, entry in index.items() if entry[1] is not None}
    denoisers = [denoiser, *other_denoisers(denoiser, kinds)]
    ways = {
        **dict.fromkeys(denoisers, f"w{weights}"),
        **_checked(folder, index, denoiser, components or {}),
    }
    reset_peak_memory()
    started = time.monotonic()
    records: dict[str, Any] = {}
    with new_checkpoint(target) as partial_folder:
        chosen = {str(folder / name) for name in ways}

        def left_out(parent: str, names: list[str]) -> list[str]:
            return [name for name in names if str(Path(parent) / name) in chosen]

        shutil.copytree(folder, partial_folder, ignore=left_out, dirs_exist_ok=True)
        for name, way in ways.items():
            of_denoiser = name in denoisers
            kept = partial(_outer_layers, reporter) if of_denoiser else lambda _: ()
            patterns = modules_to_not_convert if of_denoiser else ()
            records[name] = _pack_one(
                folder / name, partial_folder / name, way, grids, kept, patterns, reporter
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
                f"the component '{name}' is to be packed: expected one of "
                f"{', '.join(others) or 'none'}, the models of diffusers beside the denoiser"
            )
        if way not in WAYS:
            raise StepQuantError(
                f"the component '{name}' is to be {way!r}: expected one of {', '.join(WAYS)}"
            )
    return components


def _pack_one(
    source: Path,
    target: Path,
    way: str,
    grids: str,
    kept: Any,
    patterns: Collection[str],
    reporter: Reporter,
) -> dict[str, Any]:
    """Pack the component in `source` and weigh it."""
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
        patterns=patterns,
    )
    return {
        "bits": way,
        **found,
        "stored_bytes": weight_file_bytes(source.parent, source.name),
        "float32_bytes": 4 * found["parameters"],
        "checkpoint_bytes": weight_file_bytes(target.parent, target.name),
    }


def _outer_layers(reporter: Reporter, model: nn.Module) -> Collection[str]:
    """The layers that see the sample or give the result, as far as the architecture is known."""
    adapter = ADAPTERS.get(type(model).__name__)
    if adapter is None:
        reporter.line(
            f"the architecture {type(model).__name__} is not known: its input and output layers "
            "are packed like all others"
        )
        return ()
    return adapter.input_output_layers(model)
