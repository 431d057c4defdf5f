"""One way to call every denoiser, whatever the names of its arguments."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.support.errors import StepQuantError


def argument_names(denoiser: nn.Module) -> list[str]:
    """Return the argument names of `denoiser.forward`, in order; the first is the sample."""
    return list(inspect.signature(denoiser.forward).parameters)


def call_denoiser(
    denoiser: nn.Module,
    sample: Tensor,
    timestep: Tensor,
    conditions: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the prediction `[B, ...]` for `sample [B, ...]` at `timestep`, `[]` or `[B]`.

    `conditions` holds the other arguments by name. The sample is passed first, by position.
    diffusers denoisers are asked for a tuple. Timestep and conditions are moved to the sample's
    device.

    Raises:
        StepQuantError: the output holds no prediction; see `prediction_in`.
    """
    given = named_arguments(denoiser, conditions or {})
    at, given = on_device((timestep, given), sample.device)
    return prediction_in(denoiser(sample, timestep=at, **given), denoiser)


def named_arguments(denoiser: nn.Module, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments other than the timestep.

    They are `conditions`, and `return_dict=False` if `denoiser.forward` accepts it.
    """
    plain = "return_dict" in argument_names(denoiser)
    return {**conditions, **({"return_dict": False} if plain else {})}


def prediction_in(output: Any, denoiser: nn.Module) -> Tensor:
    """Return the prediction in a denoiser's output: a tensor, a tuple's first entry, or `.sample`.

    Raises:
        StepQuantError: none of these is a tensor.
    """
    found = output[0] if isinstance(output, tuple) and output else output
    found = getattr(found, "sample", found) if not isinstance(found, Tensor) else found
    if not isinstance(found, Tensor):
        raise StepQuantError(
            f"{type(denoiser).__name__} returned {type(output).__name__}: expected the prediction "
            "as a tensor, as the first entry of a tuple or as the attribute 'sample'"
        )
    return found


def channel_dim(x: Tensor) -> int:
    """Return the channel dimension of an image `[B, C, H, W]` (1) or of tokens `[B, N, C]` (-1)."""
    return -1 if x.dim() == 3 else 1


def with_prediction(output: Any, prediction: Tensor) -> Any:
    """Return a denoiser's `output` with `prediction` in place of its own prediction.

    `prediction` goes where `prediction_in` finds the tensor. `output` is not changed.
    """
    if isinstance(output, Tensor):
        return prediction
    if isinstance(output, tuple):
        first = with_prediction(output[0], prediction)
        named = getattr(output, "_fields", None)
        return output._replace(**{named[0]: first}) if named else (first, *output[1:])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, sample=prediction)
    other = copy.copy(output)
    other.sample = prediction
    return other


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in `value`: itself, or those in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, tuple | list):
        return []
    return [tensor for entry in value for tensor in tensors_in(entry)]


def leaves_in(value: Any) -> list[Any]:
    """Return the leaves of `value`: everything in its nested dictionaries, lists and tuples.

    Subclasses of list and tuple, such as `torch.Size`, are leaves themselves.
    """
    if isinstance(value, dict):
        value = list(value.values())
    if type(value) not in (tuple, list):
        return [value]
    return [leaf for entry in value for leaf in leaves_in(entry)]


def inside(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return `value` with `change` applied to each entry of a tuple, list or dictionary.

    Any other value is returned unchanged.
    """
    if isinstance(value, dict):
        return {key: change(entry) for key, entry in value.items()}
    if type(value) in (tuple, list):  # not torch.Size, which is a tuple
        return type(value)(change(entry) for entry in value)
    return value


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return `value` with each of its tensors replaced by the next of `tensors`.

    The order is that of `tensors_in`.
    """
    if isinstance(value, Tensor):
        return next(tensors)
    return inside(value, lambda entry: with_tensors(entry, tensors))


def on_device(value: Any, device: torch.device) -> Any:
    """Return `value` with all its tensors, nested ones too, moved to `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    return inside(value, lambda entry: on_device(entry, device))
