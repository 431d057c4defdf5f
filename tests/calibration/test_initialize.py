from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.calibration.initialize import (
    initialize_activations,
    initialize_ranges,
    initialize_weights,
)
from stepquant.calibration.observe import Observation, observe
from stepquant.calibration.ranges import search_activation_range, search_weight_range
from stepquant.numerics import range_to_grid
from stepquant.quantizers import ActivationQuantizer
from stepquant.support.progress import Reporter

QUIET = Reporter(quiet=True)


def observation(steps: int = 3, channels: int = 2) -> Observation:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(steps, 500, generator=generator) * torch.tensor([[1.0], [4.0], [0.2]])
    low, high = values.amin(dim=1), values.amax(dim=1)
    # The tensor's extremes are in different channels.
    return Observation(
        [torch.stack([v, v / 2]) for v in low],
        [torch.stack([v / 2, v]) for v in high],
        list(values),
        list(torch.ones_like(values)),
    )


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_each_row_of_a_table_gets_the_range_of_its_step(method):
    seen, quantizer = observation(), ActivationQuantizer(4, 3)
    initialize_activations(quantizer, seen, method)
    for row, values in enumerate(seen.values):
        low, high = values.amin().view(1), values.amax().view(1)
        scale, zero_point = (
            range_to_grid(low, high, 4)
            if method == "minmax"
            else search_activation_range(values.view(1, -1), low, high, 4)
        )
        assert quantizer.scale[row] == scale
        assert quantizer.zero_point[row] == zero_point


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_single_row_takes_all_steps_together(method):
    seen, quantizer = observation(), ActivationQuantizer(4, 1)
    initialize_activations(quantizer, seen, method)
    everything = torch.cat(seen.values).view(1, -1)
    low, high = everything.amin().view(1), everything.amax().view(1)
    scale, zero_point = (
        range_to_grid(low, high, 4)
        if method == "minmax"
        else search_activation_range(everything, low, high, 4)
    )
    assert torch.equal(quantizer.scale.data, scale)
    assert torch.equal(quantizer.zero_point.data, zero_point)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [4, 8])
def test_each_part_of_a_weight_gets_its_own_ranges(simulate, method, bits):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 3, 3)
    conv.weight.data[:, 2:] *= 10
    layer = simulate(conv, weight_bits=bits, splits=(2, 2))
    initialize_weights(layer, method)
    for quantizer, weight in zip(layer.weight_quantizers, layer.weight_parts(), strict=True):
        flat = weight.detach().flatten(1)
        if method == "mse":
            scale, zero_point = search_weight_range(flat, bits)
        elif bits == 8:
            scale, zero_point = flat.abs().amax(dim=1) / 127, torch.full((3,), 128.0)
        else:
            scale, zero_point = range_to_grid(flat.amin(dim=1), flat.amax(dim=1), bits)
        assert torch.equal(quantizer.scale.data, scale)
        assert torch.equal(quantizer.zero_point.data, zero_point)
    small, large = (quantizer.scale.mean() for quantizer in layer.weight_quantizers)
    assert large > 5 * small


def test_ranges_come_from_the_float_model_and_then_it_quantizes(tiny_session):
    session = tiny_session()
    for layer in session.layers().values():
        for quantizer in layer.activation_quantizers:
            quantizer.resize(3)
    expected = observe(session.model, session.trajectories, 2, 0, QUIET)
    initialize_ranges(session.model, session.trajectories, "minmax", "minmax", 0, 2, QUIET)
    for (name, part), seen in expected.items():
        layer = session.layers()[name]
        assert layer.quantizing
        quantizer = layer.activation_quantizers[part]
        low = torch.stack([value.amin() for value in seen.low]).clamp(max=0)
        high = torch.stack([value.amax() for value in seen.high]).clamp(min=0)
        width = quantizer.scale.detach() * (2**quantizer.bits - 1)
        torch.testing.assert_close(width, high - low, rtol=1e-5, atol=1e-6)
