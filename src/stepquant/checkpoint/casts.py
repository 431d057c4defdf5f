"""Casts of quantized models: diffusers and transformers refuse each call that names a dtype.

A call that names the model's own dtype casts nothing, and layers whose weights are dequantized on
use compute in the dtype of their input, whatever it is. Pipelines make both calls: `from_pipe`
names float32, and Stable Diffusion XL casts a VAE of float16 to float32 and back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

DTYPES = {"float": torch.float32, "half": torch.float16}


def allow_casts(model: nn.Module, other_dtypes: bool) -> None:
    """Let `model.to`, `.float` and `.half` name the dtype that the quantized `model` has.

    With `other_dtypes`, they also cast its float tensors to another one; codes and scales stay. A
    module that is not a model of these libraries has no `dtype`, and is left as it is.
    """
    if not hasattr(type(model), "dtype"):
        return
    # accelerate has put a function of its own on a model with a device_map.
    inner = vars(model).get("to")
    if isinstance(inner, partial) and inner.func is _to:
        inner = inner.args[2]
    # Not bound methods, which pickle would look up by their names on the model.
    model.to = partial(_to, model, other_dtypes, inner)  # type: ignore[method-assign]
    for name in DTYPES:
        setattr(model, name, partial(_cast, model, name, other_dtypes))


def allow_all_casts(model: nn.Module) -> None:
    """Undo `allow_casts`, for a model that is a float model again."""
    to = vars(model).pop("to", None)
    if isinstance(to, partial) and to.args[2] is not None:
        vars(model)["to"] = to.args[2]
    for name in DTYPES:
        vars(model).pop(name, None)


def _to(model: Any, other_dtypes: bool, inner: Any, *args: Any, **kwargs: Any) -> Any:
    move = inner or partial(type(model).to, model)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is None or not (other_dtypes or dtype == model.dtype):
        return move(*args, **kwargs)
    if device is not None:
        move(device, non_blocking=non_blocking)
    if memory_format is not None:
        move(memory_format=memory_format)
    if dtype != model.dtype:
        nn.Module.to(model, dtype)
    return model


def _cast(model: Any, name: str, other_dtypes: bool) -> Any:
    if other_dtypes or DTYPES[name] == model.dtype:
        return model.to(DTYPES[name])
    return getattr(type(model), name)(model)
