"""The values of a model's config that its results depend on, as a checkpoint repeats them.

`config.json` lies outside the checksum, and diffusers and transformers fill in what it lacks. The
quantization config therefore holds a copy, which the checksum covers, and a load compares the two.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepquant.support.errors import StepQuantError

# Keys that differ between equal models: quantization, dtype, and what transformers notes.
BESIDE = frozenset(
    {"architectures", "dtype", "model_type", "quantization_config", "torch_dtype"}
    | {"transformers_version"}
)
REMEDY = (
    "load it without arguments that change the config; otherwise the file is damaged or was "
    "edited, so fetch or write the checkpoint again"
)


def architecture_of(model: Any) -> dict[str, Any] | None:
    """Return the config of a model of diffusers or transformers as JSON values.

    The result is None for other modules, whose owner's code builds them.
    """
    if hasattr(model, "to_json_string"):  # diffusers keeps the config's methods on the model
        return _plain(json.loads(model.to_json_string()))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_diff_dict"):  # what transformers writes: values other than defaults
        return _plain(json.loads(json.dumps(config.to_diff_dict(), default=str)))
    return None


def _whole(model: Any) -> dict[str, Any] | None:
    """Return the config of `model` with the defaults that `architecture_of` may leave out."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "to_json_string") and hasattr(config, "to_diff_dict"):
        return _plain(json.loads(json.dumps(config.to_dict(), default=str)))
    return architecture_of(model)


def check_architecture(model: Any, recorded: dict[str, Any] | None) -> None:
    """Check the config of `model` against `recorded`, the copy in the quantization config.

    Checkpoints from before there was a copy have None and are not checked. Keys that the installed
    library no longer has are left out.

    Raises:
        StepQuantError: a value differs.
    """
    found = _whole(model)
    if recorded is not None and found is not None:
        _compare(found, recorded, f"config.json of {type(model).__name__}")


def changed(model: Any, recorded: dict[str, Any] | None) -> dict[str, Any]:
    """Return the values of the config of `model` that differ from `recorded`, by key.

    `register_to_config` of diffusers makes them differ. Without a copy, nothing differs.
    """
    found = architecture_of(model)
    if recorded is None or found is None:
        return {}
    return {key: found[key] for key in recorded if key in found and found[key] != recorded[key]}


def check_written(path: Path, config: dict[str, Any]) -> None:
    """Check the values of the config file `path` against the copy in its quantization config.

    This needs no model, which a damaged value could make too large to be built.

    Raises:
        StepQuantError: a value differs, or there is a copy that is not an object.
    """
    quantization = config.get("quantization_config")
    recorded = quantization.get("architecture") if isinstance(quantization, dict) else None
    if recorded is None:
        return
    if not isinstance(recorded, dict):
        raise StepQuantError(f"architecture in '{path}' is {recorded!r}: expected an object")
    _compare(_plain(config), recorded, f"'{path}'")


def _compare(found: dict[str, Any], recorded: dict[str, Any], where: str) -> None:
    for key, wanted in recorded.items():
        if key not in found or found[key] == wanted:
            continue
        if isinstance(wanted, dict) and isinstance(found[key], dict):
            _compare(found[key], wanted, f"'{key}' in {where}")
            continue
        raise StepQuantError(
            f"'{key}' in {where} is {found[key]!r}: expected {wanted!r}, as the quantization "
            f"config says; {REMEDY}"
        )


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in sorted(values.items())
        if not key.startswith("_") and key not in BESIDE
    }
