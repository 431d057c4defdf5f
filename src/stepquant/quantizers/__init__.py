"""Learnable quantizers with step tables, and the trainable simulation of quantized layers."""

from stepquant.quantizers.activation import ActivationQuantizer
from stepquant.quantizers.layers import QuantConv2d, QuantLayer, QuantLinear
from stepquant.quantizers.simulated_attention import ProbabilityQuantizer, QuantAttention
from stepquant.quantizers.step_grid import StepContext, StepGrid
from stepquant.quantizers.weight import WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "ProbabilityQuantizer",
    "QuantAttention",
    "QuantConv2d",
    "QuantLayer",
    "QuantLinear",
    "StepContext",
    "StepGrid",
    "WeightQuantizer",
]
