from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.calibration.ranges import search_weight_range
from stepquant.numerics import range_to_grid
from stepquant.quantizers import WeightQuantizer
from stepquant.quantizers.weight import minmax_weight_range, weight_grid
from stepquant.support.errors import StepQuantError

SHAPES = {"linear": (6, 40), "conv": (6, 5, 3, 3)}


def weight_of(shape: tuple[int, ...]) -> Tensor:
    """Channels of very different size and offset; the last one is all zero."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    view = (-1,) + (1,) * (len(shape) - 1)
    weight = weight * torch.tensor([0.01, 0.1, 1, 10, 1, 0]).view(view)
    return weight + torch.tensor([0, 0, 0.5, -5, 10, 0]).view(view)


def fitted(weight: Tensor, bits: int) -> WeightQuantizer:
    quantizer = WeightQuantizer(bits, weight.shape[0])
    quantizer.fit(weight, minmax_weight_range)
    return quantizer


def differences(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    zero_point = quantizer.zero_point.detach().round().to(torch.int64)
    codes = quantizer.codes(weight).to(torch.int64)
    return codes - zero_point.view(-1, *(1,) * (weight.dim() - 1))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_codes_are_bytes_on_the_grid_and_their_differences_fit_in_int8(
    shape: tuple[int, ...], bits: int
) -> None:
    weight = weight_of(shape)
    quantizer = fitted(weight, bits)
    codes = quantizer.codes(weight)
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape
    assert codes.max() <= 2**bits - 1
    found = differences(quantizer, weight)
    assert found.min() >= -128 and found.max() <= 127


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_is_scale_times_difference(shape: tuple[int, ...], bits: int) -> None:
    weight = weight_of(shape)
    quantizer = fitted(weight, bits)
    scale = quantizer.scale.detach().view(-1, *(1,) * (weight.dim() - 1))
    expected = differences(quantizer, weight) * scale
    torch.testing.assert_close(quantizer(weight).detach(), expected, rtol=1e-6, atol=0)


def test_8_bits_are_symmetric_around_code_128() -> None:
    weight = weight_of((6, 40))
    quantizer = fitted(weight, 8)
    assert quantizer.zero_point.tolist() == [128] * 6
    largest = weight.abs().amax(dim=1)
    torch.testing.assert_close(quantizer.scale[:5].detach(), largest[:5] / 127)
    found = differences(quantizer, weight)
    assert found.abs().amax(dim=1).tolist() == [127] * 5 + [0]


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_fewer_bits_are_affine(bits: int) -> None:
    rows = weight_of((6, 40))
    low, high = rows.amin(dim=1), rows.amax(dim=1)
    quantizer = fitted(rows, bits)
    scale, zero_point = range_to_grid(low, high, bits)
    assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero_point)
    # Channel 4 is positive throughout, so that all codes lie above zero.
    assert zero_point[4] == 0
    assert differences(quantizer, rows)[4].min() >= 0


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_out_channels_are_quantized_one_by_one(shape: tuple[int, ...], bits: int) -> None:
    weight = weight_of(shape)
    together = fitted(weight, bits)(weight)
    for channel in range(6):
        alone = weight[channel : channel + 1]
        assert torch.equal(together[channel : channel + 1], fitted(alone, bits)(alone))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_at_most_half_a_step(bits: int) -> None:
    weight = weight_of((6, 40))
    quantizer = fitted(weight, bits)
    error = (quantizer(weight) - weight).abs().amax(dim=1)
    assert (error <= quantizer.scale * (0.5 + 2**-14)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bound", [0.0, 1e-40], ids=["empty", "subnormal"])
def test_a_range_of_nothing_has_a_usable_scale(bound: float, bits: int) -> None:
    scale, _ = weight_grid(torch.tensor([-bound]), torch.tensor([bound]), bits)
    assert scale.tolist() == [1]


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_and_scale_learn_and_the_zero_point_stays(bits: int) -> None:
    weight = weight_of((6, 40)).requires_grad_()
    quantizer = fitted(weight.detach() * 0.9, bits)  # so that some saturate
    quantizer(weight).square().sum().backward()
    assert weight.grad is not None and weight.grad[:5].count_nonzero(dim=1).min() > 0
    assert quantizer.scale.grad is not None and quantizer.scale.grad[:5].count_nonzero() == 5
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"]


@pytest.mark.parametrize("bits", [0, 9, True])
def test_bits_are_checked(bits: int) -> None:
    with pytest.raises(StepQuantError, match=f"weight bits is {bits}"):
        WeightQuantizer(bits, 4)


def test_print_shows_bits_and_channels() -> None:
    assert repr(WeightQuantizer(3, 5)) == "WeightQuantizer(bits=3, out_channels=5)"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mixed_channels_are_those_of_quantizers_of_their_own(shape: tuple[int, ...]) -> None:
    weight, bits = weight_of(shape), torch.tensor([2, 3, 4, 8, 7, 1])
    mixed = WeightQuantizer(4, 6)
    mixed.channel_bits.copy_(bits)
    mixed.fit(weight, search_weight_range)
    assert mixed.channel_bits.tolist() == bits.tolist()
    for channel, count in enumerate(bits.tolist()):
        row = slice(channel, channel + 1)
        alone = WeightQuantizer(count, 1)
        alone.fit(weight[row], search_weight_range)
        assert torch.equal(mixed(weight)[row], alone(weight[row]))
        assert torch.equal(mixed.codes(weight)[row], alone.codes(weight[row]))
        assert torch.equal(mixed.differences(weight)[row], alone.differences(weight[row]))


def test_a_copy_through_the_state_dict_keeps_the_bits() -> None:
    weight = weight_of((6, 40))
    mixed = WeightQuantizer(4, 6)
    mixed.channel_bits.copy_(torch.tensor([3, 4, 5, 3, 4, 5]))
    mixed.fit(weight, search_weight_range)
    again = WeightQuantizer(4, 6)
    again.load_state_dict(mixed.state_dict())
    assert torch.equal(again(weight), mixed(weight))
