from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stepquant.calibration.ranges import search_weight_range
from stepquant.quantizers import WeightQuantizer
from stepquant.quantizers.rounding import SoftRounding, rectified_sigmoid, rounding_logits
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError

BITS = {"w2": [2] * 6, "w4": [4] * 6, "w8": [8] * 6, "mixed": [1, 2, 3, 4, 5, 2]}
SHAPES = {"linear": (6, 40), "conv": (6, 5, 3, 3)}
every_grid = pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def case(shape: tuple[int, ...], bits: list[int]) -> tuple[Tensor, WeightQuantizer]:
    """A weight, parts of which lie outside the grids found for it, some with half zero points."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    quantizer = WeightQuantizer(max(bits), shape[0])
    quantizer.channel_bits.copy_(torch.tensor(bits))
    quantizer.fit(weight, search_weight_range)
    return weight, quantizer


def bounds(weight: Tensor, quantizer: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """The codes below and above `w / s + z`, within the grid, reckoned in float64."""
    scale, zero_point, bits = (
        v.detach().double().view(-1, 1)
        for v in (quantizer.scale, quantizer.zero_point, quantizer.channel_bits)
    )
    free = (weight.double().flatten(1) / scale + zero_point).view_as(weight)
    top = (2**bits - 1).view(-1, *(1,) * (weight.dim() - 1)).expand_as(weight)
    return free.floor().clamp(min=0).minimum(top), free.ceil().clamp(min=0).minimum(top)


def test_h_is_the_stretched_sigmoid_cut_to_0_and_1() -> None:
    logits = torch.linspace(-6, 6, 49)
    expected = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-v)) - 0.1)) for v in logits.tolist()]
    found = rectified_sigmoid(logits)
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert found[0] == 0 and found[-1] == 1 and found[24] == 0.5


def test_logits_are_the_inverse_of_h() -> None:
    share = torch.linspace(0, 1, 101)
    torch.testing.assert_close(rectified_sigmoid(rounding_logits(share)), share, rtol=0, atol=1e-6)


@every_grid
@every_shape
def test_at_first_the_soft_weight_is_the_float_one_within_the_grid(
    shape: tuple[int, ...], bits: list[int]
) -> None:
    weight, quantizer = case(shape, bits)
    scale, zero_point, channel_bits = quantizer.rows(weight.dim())
    low, high = -zero_point * scale, (2.0 ** channel_bits.float() - 1 - zero_point) * scale
    expected = weight.maximum(low).minimum(high).detach()
    found = SoftRounding(quantizer, weight)().detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * 2 ** max(bits))
    inside = (weight > low) & (weight < high)
    assert 0.5 < inside.float().mean() <= 1


@every_grid
def test_the_cases_have_half_zero_points_and_weights_outside(bits: list[int]) -> None:
    weight, quantizer = case((6, 40), bits)
    if max(bits) == 2:
        assert (quantizer.zero_point % 1 == 0.5).any()
        low = -quantizer.zero_point * quantizer.scale
        assert (weight < low.view(-1, 1)).any()


@every_grid
@every_shape
def test_rounding_at_once_is_nearest_rounding(shape: tuple[int, ...], bits: list[int]) -> None:
    weight, quantizer = case(shape, bits)
    rounded = SoftRounding(quantizer, weight).rounded()
    assert torch.equal(quantizer.codes(rounded), quantizer.codes(weight))
    assert torch.equal(rounded, quantizer(weight).detach())


@every_grid
@every_shape
def test_whatever_is_learned_each_code_is_floor_or_ceiling(
    shape: tuple[int, ...], bits: list[int]
) -> None:
    weight, quantizer = case(shape, bits)
    rounding = SoftRounding(quantizer, weight)
    below, above = bounds(weight, quantizer)
    up = torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.5
    rounding.logits.data.copy_(torch.where(up, 0.1, -0.1))
    codes = quantizer.codes(rounding.rounded()).double()
    # `w / s` in float32 may lie on the other side of a whole number.
    agrees = torch.where(up, codes == above, codes == below)
    assert agrees.float().mean() > 0.99
    assert ((codes >= below - 1) & (codes <= above + 1)).all()


@every_grid
def test_the_quantizer_finds_the_learned_codes_in_the_rounded_weight(bits: list[int]) -> None:
    weight, quantizer = case((6, 40), bits)
    rounding = SoftRounding(quantizer, weight)
    rounding.logits.data.copy_(torch.randn(6, 40, generator=torch.Generator().manual_seed(5)))
    rounded = rounding.rounded()
    assert torch.equal(quantizer(rounded).detach(), rounded)
    expected = quantizer.differences(rounded) * quantizer.scale.view(-1, 1)
    assert torch.equal(expected.detach(), rounded)


@pytest.mark.parametrize("exponent", [-30, -6, 0, 20])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_survive_the_way_through_the_weight_at_every_scale(bits: int, exponent: int) -> None:
    weight = torch.randn(64, 300, generator=torch.Generator().manual_seed(6)) * 10.0**exponent
    quantizer = WeightQuantizer(bits, 64)
    quantizer.fit(weight, minmax_weight_range)
    rounding = SoftRounding(quantizer, weight)
    up = torch.rand(64, 300, generator=torch.Generator().manual_seed(7)) < 0.5
    rounding.logits.data.copy_(torch.where(up, 9.0, -9.0))
    expected = (rounding.floor + up).clamp(0, 2**bits - 1)
    assert torch.equal(quantizer.codes(rounding.rounded()).float(), expected)
    # So far out, the soft weight is the hard one.
    assert torch.equal(rounding().detach(), rounding.rounded())


def test_gradients_flow_where_rounding_is_open() -> None:
    weight, quantizer = case((6, 40), BITS["w4"])
    rounding = SoftRounding(quantizer, weight)
    with torch.no_grad():
        rounding.logits[:, :20] = 0.3
        rounding.logits[:, 20:] = 9.0  # settled
    rounding().sum().backward()
    gradient = rounding.logits.grad
    assert gradient is not None
    sigmoid = torch.sigmoid(torch.tensor(0.3))
    expected = quantizer.scale.detach() * 1.2 * sigmoid * (1 - sigmoid)
    below, above = bounds(weight, quantizer)
    inside = (below != above)[:, :20]
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(gradient[:, :20][inside], expected.view(-1, 1).expand(6, 20)[inside])
    assert not gradient[:, :20][~inside].any() and not gradient[:, 20:].any()
    assert quantizer.scale.grad is None


@pytest.mark.parametrize("build", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(12, 8, 3)])
@pytest.mark.parametrize("splits", [None, (7, 5)], ids=["one-part", "two-parts"])
def test_a_layer_computes_softly_with_gradients_and_as_packed_without(
    build: Any, splits: tuple[int, ...] | None, simulate: Any
) -> None:
    torch.manual_seed(1)
    layer = simulate(build(), 3, 8, splits)
    x = torch.randn(2, 12, 5, 5) if layer.weight.dim() == 4 else torch.randn(2, 12)
    names, nearest = list(layer.state_dict()), layer.quantized_weight().detach()
    layer.attach_roundings(layer.weight.detach())
    near = (layer.quantized_weight() - layer.weight).abs() < 1e-6
    assert near.float().mean() > 0.75  # the others lie outside the grid
    for rounding in layer.roundings:
        torch.nn.init.normal_(rounding.logits)
    soft = layer(x)
    assert soft.requires_grad
    layer.settle_roundings()
    assert torch.equal(layer(x), soft)  # still soft
    with torch.no_grad():
        simulated = layer(x)
    layer.detach_roundings()
    assert list(layer.state_dict()) == names
    learned = layer.quantized_weight().detach()
    assert torch.equal(learned, layer.weight) and not torch.equal(learned, nearest)
    packed = pack_layer(layer)
    assert torch.equal(packed.float_weight(), learned)
    torch.testing.assert_close(packed(x), simulated, rtol=1e-5, atol=1e-5)


def test_a_weight_of_other_channels_is_refused() -> None:
    _, quantizer = case((6, 40), BITS["w4"])
    with pytest.raises(StepQuantError, match=r"weight of 5 out-channels .* grids of 6"):
        SoftRounding(quantizer, torch.zeros(5, 40))


@pytest.mark.parametrize("bits", [2, 4])
def test_a_second_rounding_starts_from_the_first(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(6, 40, generator=generator)
    quantizer = WeightQuantizer(bits, 6)
    quantizer.fit(weight, search_weight_range)
    first = SoftRounding(quantizer, weight)
    first.logits.data.copy_(torch.randn(6, 40, generator=generator))
    rounded = first.rounded()
    again = SoftRounding(quantizer, weight, rounded)
    assert torch.equal(again.rounded(), rounded)
    fresh = SoftRounding(quantizer, weight)
    inside = (fresh.floor >= 0) & (fresh.floor < 2**bits - 1)
    assert inside.any()
    expected = 0.49 * rectified_sigmoid(fresh.logits) + 0.51 * (first.logits >= 0)
    found = rectified_sigmoid(again.logits)
    torch.testing.assert_close(found[inside], expected[inside], atol=1e-5, rtol=0)
