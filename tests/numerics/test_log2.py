from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepquant.numerics import dequantize_log2, fake_quantize_log2, max_code, quantize_log2
from stepquant.support.errors import StepQuantError

ALL_BITS = pytest.mark.parametrize("bits", range(1, 9))
ONE = torch.tensor(1.0)


def softmax(sharpness: float, rows: int = 256, keys: int = 256) -> Tensor:
    logits = torch.randn(rows, keys, generator=torch.Generator().manual_seed(0))
    return torch.softmax(sharpness * logits.double(), dim=-1)


def brute_force(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The code whose `scale * 2^-code` is nearest to `x` in the logarithm, in float64."""
    levels = torch.log2(scale.double()) - torch.arange(2**bits, dtype=torch.float64)
    return (torch.log2(x.double())[..., None] - levels).abs().argmin(dim=-1).to(x.dtype)


@ALL_BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_are_the_nearest_in_the_logarithm(bits: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    scale = torch.tensor(0.37, dtype=dtype)
    octaves = (max_code(bits) + 6) * torch.rand(4000, generator=generator, dtype=torch.float64) - 3
    position = octaves - octaves.floor()
    octaves = octaves[(position - 0.5).abs() > 1e-6]  # where rounding x decides is the next test's
    x = (scale.double() * torch.exp2(-octaves)).to(dtype)
    x = x[x >= 2.0**-120] if dtype == torch.float32 else x
    codes = quantize_log2(x, scale, bits)
    assert codes.dtype == dtype
    assert torch.equal(codes, brute_force(x, scale, bits))
    assert codes.min() == 0 and (bits > 6 or codes.max() == max_code(bits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("octave", [0, 1, 2, 7, 100])
def test_boundaries_are_exact_to_the_last_bit(octave: int, dtype: torch.dtype) -> None:
    boundary = torch.tensor(2.0 ** -(octave + 0.5), dtype=dtype)
    near = [boundary]
    for _ in range(4):
        near = [torch.nextafter(near[0], ONE.to(dtype) * 0), *near]
        near = [*near, torch.nextafter(near[-1], ONE.to(dtype) * 2)]
    x = torch.stack(near)
    # x > 2^-(octave + 1/2) exactly when x^2 > 2^-(2 octave + 1), which fractions can tell.
    square = Fraction(1, 2 ** (2 * octave + 1))
    expected = [octave if Fraction(float(v)) ** 2 > square else octave + 1 for v in x]
    assert quantize_log2(x, ONE.to(dtype), 8).tolist() == expected
    assert len(set(expected)) == 2


@ALL_BITS
def test_powers_of_two_of_the_scale_get_their_own_codes(bits: int) -> None:
    codes = torch.arange(min(max_code(bits), 100)).float()
    for scale in (1.0, 0.5, 1 / 3, 0.999, 0.0123):
        x = scale * torch.tensor([2.0**-q for q in range(len(codes))])
        assert torch.equal(quantize_log2(x, torch.tensor(scale), bits), codes)
        assert torch.equal(dequantize_log2(codes, torch.tensor(scale), bits), x)


def test_codes_can_be_read_off_the_bits_of_the_ratio() -> None:
    """A kernel's way, in integers, gives the same codes."""
    x = torch.rand(20_000, generator=torch.Generator().manual_seed(1)).pow(6)
    scale = torch.tensor(0.83)
    i = (x * (1 / scale)).numpy().view(np.int32)
    expected = np.clip(127 - ((i + 0x800000 - 0x3504F4) >> 23), 0, 15)
    assert quantize_log2(x, scale, 4).tolist() == expected.tolist()


@ALL_BITS
def test_the_largest_code_is_zero(bits: int) -> None:
    largest = max_code(bits)
    x = torch.tensor([0.0, -0.0, -1.0, 2.0**-149])
    codes = quantize_log2(x, ONE, bits)
    assert codes[:3].tolist() == [largest] * 3
    assert codes[3] == min(149, largest)
    assert dequantize_log2(torch.tensor([0.0, largest]), ONE, bits).tolist() == [1, 0]
    if bits < 8:
        smallest = 2.0 ** -(largest - 1)
        x = smallest * torch.tensor([1, 0.71, 0.70])
        assert fake_quantize_log2(x, ONE, bits).tolist() == [smallest, smallest, 0]


def test_above_the_grid_and_not_a_number() -> None:
    x = torch.tensor([1.0, 1.5, 100.0, math.inf, math.nan])
    codes = quantize_log2(x, ONE, 4)
    assert codes[:4].tolist() == [0, 0, 0, 0] and codes[4].isnan()
    assert dequantize_log2(codes, ONE, 4)[4].isnan()


@pytest.mark.parametrize("sharpness", [2.0, 4.0, 8.0])
def test_three_bits_need_a_zero(sharpness: float) -> None:
    """The printed grid, without one, at its best scale: larger error, and rows far above 1."""
    p, found = softmax(sharpness), {}
    for zero in (True, False):
        best = math.inf
        for factor in range(48):
            scale = p.max() * 2.0 ** (-factor / 8)
            codes = quantize_log2(p, scale, 3)
            quantized = dequantize_log2(codes, scale, 3) if zero else scale * torch.exp2(-codes)
            error = float((quantized - p).square().mean())
            if error < best:
                best, found[zero] = error, (error, float(quantized.sum(dim=-1).mean()))
    assert found[True][0] < 0.9 * found[False][0]
    assert 0.6 < found[True][1] < 1.1 and found[False][1] > 1.3


def straight_through(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The quantizer as plain differentiable code: rounding is an identity for autograd."""
    octaves = -torch.log2(x / scale)
    codes = ((octaves.round() - octaves).detach() + octaves).clamp(0, max_code(bits))
    zero = codes.detach() == max_code(bits)
    return torch.where(zero, torch.zeros_like(x), scale * torch.exp2(-codes))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (3, 2, 50)], ids=str)
def test_values_and_gradients_are_the_straight_through_ones(
    bits: int, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(bits)
    scale = 0.2 + torch.rand(shape, generator=generator, dtype=torch.float64)
    octaves = 14 * torch.rand(3, 2, 50, generator=generator, dtype=torch.float64) - 2
    x = scale * torch.exp2(-octaves)
    upstream = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    results = []
    for function in (fake_quantize_log2, straight_through):
        leaves = [value.clone().requires_grad_() for value in (x, scale)]
        y = function(*leaves, bits)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, upstream)))
    for ours, oracle in zip(*results, strict=True):
        assert ours.shape == oracle.shape
        torch.testing.assert_close(ours, oracle, rtol=1e-11, atol=1e-11)
    assert results[0][1].count_nonzero() > 0 and results[0][2].count_nonzero() > 0


def test_gradients_inside_above_and_at_zero() -> None:
    x = torch.tensor([1.0, 0.8, 1.4, 1.42, math.inf, 0.0, 0.01], requires_grad=True)
    scale = torch.ones(7, requires_grad=True)
    fake_quantize_log2(x, scale, 3).sum().backward()
    assert x.grad is not None and scale.grad is not None
    assert x.grad.tolist() == pytest.approx([1, 1 / 0.8, 1 / 1.4, 0, 0, 0, 0])
    assert scale.grad.tolist() == [0, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x", "scale"])
def test_each_gradient_can_be_had_alone(wanted: tuple[bool, bool]) -> None:
    x, scale = (torch.tensor(v).requires_grad_(w) for v, w in zip((2.0, 1.0), wanted, strict=True))
    fake_quantize_log2(x, scale, 4).backward()
    assert [x.grad is not None, scale.grad is not None] == list(wanted)


positive = st.floats(2.0**-60, 2.0**20, width=32)
non_negative = st.just(0.0) | positive


@given(st.lists(non_negative, min_size=1, max_size=20), positive, st.integers(1, 8))
def test_invariants(values: list[float], scale: float, bits: int) -> None:
    x, s = torch.tensor(values).sort().values, torch.tensor(scale)
    codes = quantize_log2(x, s, bits)
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= max_code(bits)
    assert (codes.diff() <= 0).all()
    real = fake_quantize_log2(x, s, bits)
    assert torch.equal(real, dequantize_log2(codes, s, bits))
    assert (real.diff() >= 0).all() and (real >= 0).all() and (real <= s).all()
    assert torch.equal(fake_quantize_log2(real, s, bits), real)
    inside = (real > 0) & (x <= s)
    assert (torch.log2(real[inside].double() / x[inside].double()).abs() <= 0.5 + 1e-6).all()
    # Another unit, a power of two so that float32 is exact, leaves the codes as they are.
    assert torch.equal(quantize_log2(x * 2.0**-9, s * 2.0**-9, bits), codes)
    torch.testing.assert_close(fake_quantize_log2(x * 8, s * 8, bits), real * 8, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0, 9, True])
def test_bits_are_checked(bits: int) -> None:
    with pytest.raises(StepQuantError, match=f"bits of the log2 grid is {bits}: expected"):
        quantize_log2(ONE, ONE, bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(StepQuantError, match=f"are {dtype}: expected float32 or float64"):
        quantize_log2(ONE.to(dtype), ONE.to(dtype), 4)
