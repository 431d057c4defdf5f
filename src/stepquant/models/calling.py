"""One way to call every denoiser, whatever the names of its arguments."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

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
        named: Any = output
        fields = getattr(output, "_fields", None)
        return named._replace(**{fields[0]: first}) if fields else (first, *output[1:])
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return dataclasses.replace(output, sample=prediction)
    other = copy.copy(output)
    other.sample = prediction
    return other


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in `value`: itself, or those in nested containers and output classes."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """`value` with its tensors replaced by the next of `tensors`, in the order of `tensors_in`."""
    return tree_map_only(Tensor, lambda _: next(tensors), value)


def on_device(value: Any, device: torch.device) -> Any:
    """`value` with all tensors in it, nested ones too, on `device`."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)
