"""What every room's tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import nn

from stepquant.quantizers import QuantConv2d, QuantLayer, QuantLinear, StepContext, StepGrid

# The same examples on every machine, and no verdict by stopwatch.
settings.register_profile("stepquant", deadline=None, derandomize=True)
settings.load_profile("stepquant")

Simulate = Callable[..., QuantLayer]


@pytest.fixture
def context() -> StepContext:
    """Five steps at the timesteps 0, 10, 20, 30, 40."""
    return StepContext(StepGrid(torch.arange(5) * 10))


@pytest.fixture
def simulate(context: StepContext) -> Simulate:
    """Builds a quantizing layer: weight ranges from the weight, random step tables."""

    def build(
        layer: nn.Linear | nn.Conv2d,
        weight_bits: int = 8,
        activation_bits: int = 8,
        splits: tuple[int, ...] | None = None,
        steps: int = 5,
        quantizing: bool = True,
    ) -> QuantLayer:
        kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
        quantized = kind(layer, weight_bits, activation_bits, context, splits)
        pairs = zip(quantized.weight_quantizers, quantized.weight_parts(), strict=True)
        for quantizer, weight in pairs:
            rows = weight.detach().flatten(1)
            quantizer.set_range(rows.amin(dim=1), rows.amax(dim=1))
        generator = torch.Generator().manual_seed(steps)
        codes = 2**activation_bits
        for quantizer in quantized.activation_quantizers:
            quantizer.resize(steps)
            scale = (0.5 + torch.rand(steps, generator=generator)) * 4 / codes
            quantizer.scale.data.copy_(scale)
            quantizer.zero_point.data.copy_(
                torch.randint(codes // 4, codes // 2 + 1, (steps,), generator=generator)
            )
        quantized.quantizing = quantizing
        return quantized

    return build
