"""Memory use of a quantized model's weights, and the memory mode that determines it."""

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
    """Choose how the integer layers of `model` keep their weights in memory.

    - "fast", the default: in the kernels' layout, at a quarter of float32's size, or an eighth if
      the native kernel runs and the weights have at most 4 bits. The next call lays them out.
    - "low": as packed bytes, an eighth of float32's size at 4 bits. Each call lays them out again.

    The model's results are the same in both modes.

    Raises StepQuantError for any other mode, and if `model` has no integer layer.
    """
    if mode not in MODES:
        raise StepQuantError(f"unknown memory mode '{mode}': expected {' or '.join(MODES)}")
    layers = _layers(model)
    if not layers:
        raise StepQuantError(
            f"{type(model).__name__} has no packed layer: expected a denoiser that stepquant "
            "quantize packed, because only packed layers have memory modes"
        )
    for layer in layers:
        layer.drop_layout()
        layer.memory = mode


class WeightBytes(NamedTuple):
    """Memory use of the weights of quantized layers, in bytes."""

    resident: int
    """All tensors of the weights: packed bytes, layouts, scales, zero points and sums."""
    float32: int
    """The same weights in float32."""

    @property
    def times_smaller(self) -> float:
        """`float32 / resident`."""
        return self.float32 / self.resident


def weight_bytes_resident(model: nn.Module) -> WeightBytes:
    """The current memory use of the weights of the quantized layers in `model`, without biases.

    The first call lays the weights out, so the figure may change with it.
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
        return int(torch.ops.mkldnn._nbytes(tensor))  # oneDNN pads channels to whole blocks
    return tensor.numel() * tensor.element_size()


def _layers(model: nn.Module) -> list[IntegerLayer]:
    return [module for module in model.modules() if isinstance(module, IntegerLayer)]
