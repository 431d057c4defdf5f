from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from stepquant.numerics import (
    dequantize,
    fake_quantize,
    max_code,
    max_codes,
    quantize,
    range_to_grid,
    scale_of,
)


def straight_through(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """The quantizer as plain differentiable code: rounding is an identity for autograd."""

    def through(value: Tensor) -> Tensor:
        return (value.round() - value).detach() + value

    zero = through(zero_point)
    code = (through(x / scale) + zero).clamp(0, max_code(bits))
    return (code - zero) * scale


def on_grid_noise(shape: tuple[int, ...], scale: Tensor, bits: int, seed: int = 0) -> Tensor:
    """Float64 values in and around the grid, none near a tie where float32 may round otherwise."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2**bits), 2 ** (bits + 1), shape, generator=generator)
    offsets = 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.4
    return (codes + offsets) * scale.to(torch.float64)


BROADCASTS = {
    "scalar": ((3, 5), ()),
    "one-element": ((3, 5), (1,)),
    "per-sample-tokens": ((3, 2, 5), (3, 1, 1)),
    "per-sample-image": ((3, 4, 2, 2), (3, 1, 1, 1)),
    "per-out-channel-conv": ((6, 4, 3, 3), (6, 1, 1, 1)),
    "per-out-channel-linear": ((6, 4), (6, 1)),
    "elementwise": ((3, 5), (3, 5)),
}


def grid(shape: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    scale = 0.01 + torch.rand(shape, generator=generator, dtype=torch.float64)
    zero_point = max_code(bits) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return scale, zero_point


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_agree_with_float64(bits: int) -> None:
    scale, zero_point = grid((6, 1), bits)
    scale, zero_point = scale.float(), zero_point.round().float()
    x = on_grid_noise((6, 200), scale, bits).float()
    expected = (x.double() / scale.double()).round() + zero_point.double()
    expected = expected.clamp(0, 2**bits - 1)
    codes = quantize(x, scale, zero_point, bits)
    assert codes.dtype == torch.float32
    assert torch.equal(codes.double(), expected)
    assert codes.min() == 0 and codes.max() == max_code(bits)
    real = dequantize(codes, scale, zero_point)
    oracle = (expected - zero_point.double()) * scale.double()
    torch.testing.assert_close(real.double(), oracle, rtol=1e-6, atol=0)


def test_ties_round_to_even_codes() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5])
    codes = quantize(x, torch.tensor(1.0), torch.tensor(0.0), 4)
    assert codes.tolist() == [0, 2, 2, 4, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("x_shape", "grid_shape"), BROADCASTS.values(), ids=BROADCASTS)
def test_fake_quantize_has_the_straight_through_values_and_gradients(
    x_shape: tuple[int, ...], grid_shape: tuple[int, ...], bits: int
) -> None:
    scale, zero_point = grid(grid_shape, bits)
    x = on_grid_noise(x_shape, scale, bits)
    upstream = torch.randn(x_shape, generator=torch.Generator().manual_seed(3)).double()
    results = []
    for function in (fake_quantize, straight_through):
        leaves = [value.clone().requires_grad_() for value in (x, scale, zero_point)]
        y = function(*leaves, bits)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, upstream)))
    for ours, oracle in zip(*results, strict=True):
        assert ours.shape == oracle.shape
        torch.testing.assert_close(ours, oracle, rtol=1e-11, atol=1e-11)
    _, grad_x, grad_scale, grad_zero_point = results[0]
    assert grad_x.count_nonzero() > 0
    assert grad_scale.count_nonzero() > 0 and grad_zero_point.count_nonzero() > 0


def test_gradients_in_float32_agree_with_float64() -> None:
    scale, zero_point = (value.float() for value in grid((3, 1, 1, 1), 4))
    x = on_grid_noise((3, 4, 5, 5), scale, 4).float()
    grads = []
    for dtype, function in ((torch.float32, fake_quantize), (torch.float64, straight_through)):
        leaves = [value.to(dtype).requires_grad_() for value in (x, scale, zero_point)]
        grads.append(torch.autograd.grad(function(*leaves, 4).sum(), leaves))
    for ours, oracle in zip(*grads, strict=True):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-4)


def test_gradient_at_the_ends_of_the_grid_counts_as_inside() -> None:
    x = torch.tensor([0.0, 15.0, -0.6, 15.6], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), torch.tensor(0.0), 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, False), (False, False, True)],
    ids=["x", "scale", "zero_point"],
)
def test_each_gradient_can_be_had_alone(wanted: tuple[bool, bool, bool]) -> None:
    scale, zero_point = grid((3, 1), 4)
    values = (on_grid_noise((3, 50), scale, 4), scale, zero_point)
    leaves = [
        value.clone().requires_grad_(want) for value, want in zip(values, wanted, strict=True)
    ]
    fake_quantize(*leaves, 4).sum().backward()
    oracle = [value.clone().requires_grad_() for value in values]
    straight_through(*oracle, 4).sum().backward()
    for leaf, reference, want in zip(leaves, oracle, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, reference.grad)


def test_a_real_zero_point_is_rounded() -> None:
    x, scale = torch.linspace(-2, 2, 33), torch.tensor(0.25)
    rounded = fake_quantize(x, scale, torch.tensor(8.0), 4)
    assert torch.equal(fake_quantize(x, scale, torch.tensor(8.3), 4), rounded)
    assert not torch.equal(fake_quantize(x, scale, torch.tensor(9.0), 4), rounded)


def test_fake_quantize_is_idempotent() -> None:
    scale, zero_point = torch.tensor(0.037), torch.tensor(5.0)
    once = fake_quantize(torch.linspace(-1, 2, 500), scale, zero_point, 5)
    assert torch.equal(fake_quantize(once, scale, zero_point, 5), once)


bounds = st.floats(-(2.0**100), 2.0**100, width=32)


@given(bounds, bounds, st.integers(1, 8))
@example(0.0, 0.0, 4)
@example(-3.0, -1.0, 4)
@example(1.0, 3.0, 4)
@example(0.0, 1e-40, 8)
@example(-(2.0**-149), 2.0**-149, 1)
def test_range_to_grid_covers_the_range_and_zero(first: float, second: float, bits: int) -> None:
    low, high = (torch.tensor(value) for value in sorted((first, second)))
    scale, zero_point = range_to_grid(low, high, bits)
    assert scale > 0 and torch.isfinite(scale) and torch.isfinite(1 / scale)
    assert 0 <= zero_point <= max_code(bits) and zero_point == zero_point.round()
    zero = torch.tensor(0.0)
    assert quantize(zero, scale, zero_point, bits) == zero_point
    assert dequantize(zero_point, scale, zero_point) == 0
    fractions = torch.linspace(0, 1, 17)
    x = torch.cat([low * (1 - fractions) + high * fractions, zero.view(1)])
    real = dequantize(quantize(x, scale, zero_point, bits), scale, zero_point)
    # Half a step, and the rounding of float32 in codes up to 255.
    assert (real - x).abs().max() <= scale * (0.5 + 2**-14)


def test_an_empty_range_gets_scale_1() -> None:
    low, high = torch.tensor([0.0, -1.0]), torch.tensor([0.0, 3.0])
    scale, zero_point = range_to_grid(low, high, 8)
    assert scale.tolist() == [1, pytest.approx(4 / 255)]
    assert zero_point.tolist() == [0, 64]


def test_range_to_grid_works_row_by_row() -> None:
    low, high = torch.tensor([-1.0, 0.5, -3.0]), torch.tensor([2.0, 2.0, -1.0])
    scale, zero_point = range_to_grid(low, high, 4)
    for row in range(3):
        one_scale, one_zero = range_to_grid(low[row], high[row], 4)
        assert scale[row] == one_scale and zero_point[row] == one_zero
    assert zero_point.tolist() == [5, 0, 15]


@pytest.mark.parametrize("bits", range(1, 7))
def test_half_zero_points_give_levels_half_a_step_off(bits: int) -> None:
    scale, zero_point = torch.tensor([[0.5]]), torch.tensor([[max_code(bits) / 2]])
    x = torch.linspace(-40, 40, 3201)[None]
    real = fake_quantize(x, scale, zero_point, bits, halves=True)
    levels = (torch.arange(2**bits) - max_code(bits) / 2) * 0.5
    assert torch.equal(real.unique(), levels)
    nearest = (x[..., None] - levels).abs().amin(dim=-1)
    torch.testing.assert_close((real - x).abs(), nearest)


@pytest.mark.parametrize("bits", range(1, 9))
def test_whole_zero_points_are_the_same_with_and_without_halves(bits: int) -> None:
    scale, zero_point = grid((6, 1), bits)
    scale, zero_point = scale.float(), zero_point.round().float()
    x = on_grid_noise((6, 200), scale, bits).float()
    plain = quantize(x, scale, zero_point, bits)
    assert torch.equal(plain, quantize(x, scale, zero_point, bits, halves=True))


def test_bits_of_each_channel_are_those_of_a_quantizer_of_its_own() -> None:
    bits = torch.tensor([1, 2, 3, 5, 7, 8], dtype=torch.uint8)
    scale, zero_point = torch.linspace(0.1, 1, 6)[:, None], (max_codes(bits) / 2)[:, None]
    x = 8 * torch.randn(6, 500, generator=torch.Generator().manual_seed(0))
    mixed = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    fake_quantize(*mixed, bits[:, None], halves=True).square().sum().backward()
    for row, count in enumerate(bits.tolist()):
        alone = [t[row : row + 1].clone().requires_grad_() for t in (x, scale, zero_point)]
        result = fake_quantize(*alone, count, halves=True)
        both = fake_quantize(x, scale, zero_point, bits[:, None], halves=True)
        assert torch.equal(both[row : row + 1], result.detach())
        result.square().sum().backward()
        for together, own in zip(mixed, alone, strict=True):
            torch.testing.assert_close(together.grad[row : row + 1], own.grad)


def test_halves_have_the_gradients_of_a_straight_through_round() -> None:
    scale = torch.tensor([[0.3], [1.0]], dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor([[1.5], [0.5]], dtype=torch.float64)
    x = (torch.linspace(-3, 3, 41, dtype=torch.float64) + 0.01).repeat(2, 1).requires_grad_()

    def plain(x: Tensor, scale: Tensor) -> Tensor:
        scaled = x / scale + zero_point
        code = ((scaled.round() - scaled).detach() + scaled).clamp(0, 3)
        return (code - zero_point) * scale

    weights = torch.linspace(1, 2, 41, dtype=torch.float64)
    ours = torch.autograd.grad(
        (fake_quantize(x, scale, zero_point, 2, halves=True) * weights).sum(), (x, scale)
    )
    theirs = torch.autograd.grad((plain(x, scale) * weights).sum(), (x, scale))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_scale_is_one_where_there_is_no_range() -> None:
    tiny = torch.finfo(torch.float32).tiny
    widths = torch.tensor([0.0, tiny / 8, 127.0])
    assert scale_of(widths, 127).tolist() == [1.0, 1.0, 1.0]
    assert scale_of(widths, 127, inverted=False).tolist() == [1.0, float(widths[1] / 127), 1.0]
