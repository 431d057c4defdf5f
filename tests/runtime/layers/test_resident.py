"""Memory modes of models, and the memory that weights take in each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.resident import WeightBytes, set_memory_mode, weight_bytes_resident
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError


@torch.no_grad()
def test_bytes_are_counted(simulate):
    layer = pack_layer(simulate(nn.Linear(256, 128), 4, 8))
    small = 128 * (4 + 1)  # scales, zero points
    expected = WeightBytes(256 * 128 // 2 + small, 4 * 256 * 128)
    assert weight_bytes_resident(layer) == expected
    layer.backend = "reference"
    x = torch.randn(2, 256)
    layer(x)
    assert weight_bytes_resident(layer).resident == 256 * 128 + small
    set_memory_mode(layer, "low")
    layer(x)
    assert weight_bytes_resident(layer) == expected
    assert expected.times_smaller == pytest.approx(7.7, abs=0.1)


def test_memory_modes_are_checked(simulate):
    layer = pack_layer(simulate(nn.Linear(12, 8), 4, 8))
    with pytest.raises(StepQuantError, match="unknown memory mode 'tiny': expected fast or low"):
        set_memory_mode(layer, "tiny")
    with pytest.raises(StepQuantError, match="Linear has no packed layer: expected a denoiser"):
        set_memory_mode(nn.Linear(2, 2), "low")
    assert isinstance(layer, IntegerLayer) and layer.memory == "fast"
