"""An empty parameter that carries the dtype and device of a quantized layer.

Models and pipelines read `next(module.parameters()).dtype` to choose the dtype of activations.
Quantized layers hold codes, and scales that stay float32, so none of their tensors has that dtype.
The marker has it. State dicts and accelerate's hooks do not see the marker.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

NAME = "dtype_marker"


class MarksDtype(nn.Module):
    """Base class of layers whose first parameter is the marker; see `mark`."""

    def mark(self, dtype: torch.dtype) -> None:
        """Make a marker of `dtype` the first parameter."""
        others = {key: value for key, value in self._parameters.items() if key != NAME}
        self._parameters.clear()
        cpu = torch.device("cpu")  # explicit: layers may be created on the meta device
        empty = torch.empty(0, dtype=dtype, device=cpu)
        self.register_parameter(NAME, nn.Parameter(empty, requires_grad=False))
        self._parameters.update(others)

    def marked_dtype(self) -> torch.dtype:
        """The dtype of the marker: that of the model's float tensors."""
        marker = self._parameters[NAME]
        assert marker is not None
        return marker.dtype

    def float_parameters(self) -> int:
        """The number of parameters of the float layer."""
        raise NotImplementedError

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """As `nn.Module`, but omits the marker without `recurse`, so that hooks do not move it."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            if recurse or name.rpartition(".")[2] != NAME:
                yield name, parameter

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + NAME, None)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        marker = self._parameters.pop(NAME, None)
        super()._load_from_state_dict(*args, **kwargs)
        others = dict(self._parameters)
        self._parameters.clear()
        self._parameters.update({NAME: marker, **others})


def is_marker(layer: nn.Module, tensor: Tensor) -> bool:
    """Whether `tensor` is the marker of `layer`."""
    return tensor is layer._parameters.get(NAME)


def place_markers(model: nn.Module) -> None:
    """Move each marker in `model` to its layer's device; call this after loading."""
    for module in model.modules():
        if isinstance(module, MarksDtype):
            tensors: list[Tensor] = [each for _, each in module.named_parameters(recurse=False)]
            tensors += [t for t in module._buffers.values() if t is not None]
            marker = module._parameters[NAME]
            if tensors and marker is not None and not tensors[0].is_meta:
                marker.data = marker.data.to(tensors[0].device)


def count_as_float(model: nn.Module) -> None:
    """Make `model.num_parameters()` return the number of parameters of the float model."""
    if hasattr(type(model), "num_parameters"):
        # Not a bound method, which pickle would look up by its name on the model.
        model.num_parameters = partial(_num_parameters, model)  # type: ignore[assignment]


def _num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """As the class's method, but counts quantized layers like the float layers they replace."""
    count: int = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    for module in model.modules():
        if isinstance(module, MarksDtype):
            held = sum(each.numel() for each in module.parameters(recurse=False))
            count += module.float_parameters() - held
    return count


def values_of(shape: tuple[int, ...], bias: Tensor | None) -> int:
    """The number of values in a weight of `shape` and its bias, if any."""
    return math.prod(shape) + (0 if bias is None else bias.numel())
