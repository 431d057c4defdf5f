"""Out-channels of several bit widths, and zero points in half steps, in the packed runtime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layer_cases import assert_agrees, input_for, layers, seeded
from stepquant.calibration.ranges import search_weight_range
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError


@layers
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("splits", [(12,), (7, 5)], ids=str)
@pytest.mark.parametrize("bits", [[1, 2, 3], [3, 4, 5], [6, 7, 8]], ids=str)
@torch.no_grad()
def test_out_channels_of_several_bit_widths_agree_with_the_simulation(
    kind: str, backend: str, splits: tuple[int, ...], bits: list[int], simulate: Any
) -> None:
    layer = simulate(seeded(kind), bits[1], 8, splits)
    layer.set_channel_bits(torch.tensor(bits).repeat(3)[:8])
    layer.fit_weights(search_weight_range)
    packed = pack_layer(layer)
    packed.backend = backend
    counts = ((bits[0], 3), (bits[1], 3), (bits[2], 2))
    assert packed.spec.channel_counts == counts and packed.spec.weight_bits == bits[2]
    if bits[0] != 3:  # some of three bits choose halves, some do not
        assert packed.spec.half_zero_points == (bits[0] == 1)
    columns = [channels * packed.spec.columns // 12 for channels in splits]
    size = sum(-(-count * column * width // 8) for width, count in counts for column in columns)
    assert packed.weight_packed.numel() == size
    assert packed.spec.mean_weight_bits == sum(width * count for width, count in counts) / 8
    assert torch.equal(packed.float_weight(), layer.quantized_weight())
    result, simulated = packed(input_for(kind)), layer(input_for(kind))
    assert_agrees(result, simulated)
    assert backend != "reference" or torch.equal(result, simulated)


def test_half_zero_points_of_more_than_six_bits_are_refused(simulate: Any) -> None:
    layer = simulate(nn.Linear(12, 8), 7)
    layer.weight_quantizers[0].zero_point.fill_(63.5)
    told = r"half zero points has .* 7 bits, with zero points of 63\.5 to 63\.5: expected at most 6"
    with pytest.raises(StepQuantError, match=told):
        pack_layer(layer)
