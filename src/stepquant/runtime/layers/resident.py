"""The memory that the weights of a model's integer layers take, and the mode that decides it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.packed_weight import MODES
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.support.errors import StepQuantError

__all__ = ["MODES", "WeightBytes", "set_memory_mode", "weight_bytes_resident"]

FLOAT = 4  # bytes


def set_memory_mode(model: nn.Module, mode: str) -> None:
    """Choose what the integer layers of `model` keep of their weights: "fast" or "low".

    "fast", the default: weights in the layout of the CPU's kernels, a quarter of float32, or an
    eighth where the native kernel runs and the weights have 4 bits or less. The first call after
    this one lays them out. "low": the packed bytes, an eighth of float32 at 4 bits, which each call
    lays out anew. The model's results are the same.

    Raises StepQuantError for another mode, and if `model` has no integer layer.
    """
    if mode not in MODES:
        raise StepQuantError(f"unknown memory mode '{mode}': expected {' or '.join(MODES)}")
    layers = _layers(model)
    if not layers:
        raise StepQuantError(
            f"{type(model).__name__} has no packed layer: expected a denoiser that stepquant "
            "quantize packed, because only its layers have memory modes"
        )
    for layer in layers:
        layer.drop_layout()
        layer.memory = mode


class WeightBytes(NamedTuple):
    """The memory that the weights of quantized layers take, in bytes."""

    resident: int
    """All tensors held for them: packed, laid out, scales, zero points, sums."""
    float32: int
    """The same weights in float32."""

    @property
    def times_smaller(self) -> float:
        """`float32 / resident`."""
        return self.float32 / self.resident


def weight_bytes_resident(model: nn.Module) -> WeightBytes:
    """The memory that the weights of the quantized layers of `model` take now, without biases.

    Before the first call no weight is laid out.
    """
    layers = _layers(model)
    others = [module for module in model.modules() if isinstance(module, WeightOnly)]
    held = [tensor for layer in layers for tensor in layer.weight_tensors()]
    held += [tensor for other in others for tensor in other.held()]
    weights = sum(layer.spec.out_channels * layer.spec.columns for layer in layers)
    weights += sum(math.prod(other.weight_shape) for other in others)
    return WeightBytes(sum(_size(tensor) for tensor in held), FLOAT * weights)


def _size(tensor: Tensor) -> int:
    if tensor.is_mkldnn and hasattr(torch.ops.mkldnn, "_nbytes"):
        return int(torch.ops.mkldnn._nbytes(tensor))  # channels are padded to whole blocks
    return tensor.numel() * tensor.element_size()


def _layers(model: nn.Module) -> list[IntegerLayer]:
    return [module for module in model.modules() if isinstance(module, IntegerLayer)]
