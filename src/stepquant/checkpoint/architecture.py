"""The values of a model's config that its results depend on, as a checkpoint repeats them.

`config.json` lies outside the checksum, and diffusers and transformers fill in what it lacks. The
quantization config therefore holds a copy, which the checksum covers, and a load compares the two.
"""

from __future__ import annotations

import json
from typing import Any

from stepquant.support.errors import StepQuantError

# Keys that differ between equal models: quantization, dtype, and what transformers notes.
BESIDE = frozenset(
    {"architectures", "dtype", "model_type", "quantization_config", "torch_dtype"}
    | {"transformers_version"}
)
REMEDY = "the file is damaged or was edited, so fetch or write the checkpoint again"


def architecture_of(model: Any) -> dict[str, Any] | None:
    """Return the config of a model of diffusers or transformers as JSON values.

    The result is None for other modules, whose owner's code builds them.
    """
    config = getattr(model, "config", None)
    if hasattr(model, "to_json_string"):  # diffusers keeps the config's methods on the model
        return _plain(json.loads(model.to_json_string()))
    if hasattr(config, "to_dict"):
        return _plain(json.loads(json.dumps(config.to_dict(), default=str)))
    return None


def check_architecture(model: Any, recorded: dict[str, Any] | None) -> None:
    """Check the config of `model` against `recorded`, the copy in the quantization config.

    Checkpoints from before there was a copy have None and are not checked. Keys that the installed
    library no longer has are left out.

    Raises:
        StepQuantError: a value differs.
    """
    found = architecture_of(model)
    if recorded is not None and found is not None:
        _compare(found, recorded, f"config.json of {type(model).__name__}")


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
