"""The kinds of quantized models, determined by their layers."""

from __future__ import annotations

from enum import Enum

from torch import nn

from stepquant.runtime.layers.dynamic import Dynamic
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.weight_only import WeightOnly


class Kind(str, Enum):
    """The arithmetic of quantized layers."""

    INTEGER = "integer"
    """Integer products with calibrated activation grids: `quantize` with calibration."""
    WEIGHT_ONLY = "weight-only"
    """Float products with dequantized weights: the recipe weight-only, `WeightOnlyConfig`."""
    DYNAMIC = "dynamic"
    """Integer products with activation scales computed in each call: `DynamicConfig`."""


def kind_of(model: nn.Module) -> Kind | None:
    """The kind of the quantized layers in `model`, or None for a float model."""
    for module in model.modules():
        if isinstance(module, IntegerLayer):
            return Kind.INTEGER
        if isinstance(module, WeightOnly):
            return Kind.DYNAMIC if isinstance(module, Dynamic) else Kind.WEIGHT_ONLY
    return None
