"""Digests of everything in a pipeline that calibration depends on."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.checkpoint.architecture import architecture_of
from stepquant.models.mapped import FloatState
from stepquant.support.work_folder import fingerprint

ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what tells `model` from others: its tensors, its modules and its config.

    The text of the modules shows settings of a model that has no config, such as the epsilon of its
    norms.
    """
    modules = ADDRESS.sub("", repr(model))
    return {
        "tensors": fingerprint(FloatState(model)),
        "modules": hashlib.sha256(modules.encode()).hexdigest(),
        "config": architecture_of(model),
    }


def pipeline_fingerprint(pipeline: DiffusionPipeline, denoiser: str) -> dict[str, Any]:
    """Return what tells the components and settings of `pipeline` from others.

    The component `denoiser` and the scheduler, which calibration may exchange, are left out.
    """
    components = {
        name: _fingerprint(part)
        for name, part in sorted(pipeline.components.items())
        if name not in (denoiser, "scheduler") and part is not None
    }
    settings = {
        key: value
        for key, value in sorted(pipeline.config.items())
        if not key.startswith("_") and isinstance(value, bool | int | float | str)
    }
    return {"components": components, "settings": settings}


def _fingerprint(part: Any) -> Any:
    """Return JSON values that differ between components that compute differently."""
    if isinstance(part, nn.Module):
        return model_fingerprint(part)
    if hasattr(part, "get_vocab"):
        return _tokenizer(part)
    if hasattr(part, "to_json_string"):  # processors and schedulers
        values = json.loads(part.to_json_string())
        return {key: value for key, value in values.items() if not key.startswith("_")}
    return type(part).__name__


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    whole = getattr(tokenizer, "backend_tokenizer", None)
    text = json.dumps(sorted(tokenizer.get_vocab().items())) if whole is None else whole.to_str()
    return {
        "class": type(tokenizer).__name__,
        "tokens": hashlib.sha256(text.encode()).hexdigest(),
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "length": str(tokenizer.model_max_length),
    }
