"""A bias for each step: packed against simulated layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from layer_cases import assert_agrees, input_for, layers, seeded
from stepquant.simulation.packing import pack_layer


@layers
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no-bias"])
@torch.no_grad()
def test_a_bias_of_the_step_is_added_to_the_result(
    kind: str, backend: str, has_bias: bool, simulate: Any
) -> None:
    plain = simulate(seeded(kind), 4, 8)
    if not has_bias:
        plain.bias = None
    layer = copy.deepcopy(plain)
    step_bias = torch.randn(5, layer.out_channels, generator=torch.Generator().manual_seed(2))
    layer.set_step_bias(step_bias)
    packed = pack_layer(layer)
    packed.backend = backend
    x = input_for(kind, 5)
    for timestep, rows in ((20, [2]), (torch.tensor([40, 0, 10, 0, 30]), [4, 0, 1, 0, 3])):
        for module in (plain, layer):
            module.context.set_timestep(timestep)
        shape = [len(rows)] + [1] * (x.dim() - 1)
        shape[layer.channel_dim] = layer.out_channels
        added = step_bias[rows].view(shape)
        result = packed(x)
        torch.testing.assert_close(result, plain(x) + added, rtol=1e-4, atol=1e-4)
        assert_agrees(result, layer(x))
        assert backend != "reference" or torch.equal(result, layer(x))
