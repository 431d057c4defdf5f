"""Layers of every kind, their inputs, and how near packed and simulated ones must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear-no-bias": lambda: nn.Linear(12, 8, bias=False),
    "conv1x1": lambda: nn.Conv2d(12, 8, 1),
    "conv3x3": lambda: nn.Conv2d(12, 8, 3, padding=1),
    "conv5x3-stride-1-2": lambda: nn.Conv2d(12, 8, (5, 3), (1, 2), (2, 1), bias=False),
    "conv3x3-dilated": lambda: nn.Conv2d(12, 8, 3, padding=2, dilation=2),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def seeded(kind: str) -> nn.Module:
    """The layer called `kind`, always with the same weights."""
    torch.manual_seed(1)
    return LAYERS[kind]()


def input_for(kind: str, batch: int = 3) -> Tensor:
    """An input for the layer called `kind`."""
    shape = (batch, 5, 12) if kind.startswith("linear") else (batch, 12, 7, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def assert_agrees(packed: Tensor, simulated: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the largest value, the tolerance that DESIGN states."""
    assert packed.shape == simulated.shape and packed.dtype == simulated.dtype
    error = (packed - simulated).abs().max() / simulated.abs().max()
    assert error <= tolerance


class Denoiser(nn.Module):
    """A denoiser of one layer, which ignores the timestep that it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor | int) -> Tensor:
        return self.layer(sample)
