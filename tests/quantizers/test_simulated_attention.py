"""Simulated attention products: gradients, integers, and rows for each sample."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stepquant.numerics import dequantize, quantize
from stepquant.numerics.log2 import dequantize_log2, quantize_log2
from stepquant.quantizers import ProbabilityQuantizer, QuantAttention, StepContext, StepGrid
from stepquant.support.errors import StepQuantError

B, H, N, M, D, STEPS = 4, 2, 5, 6, 8, 4


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return random(0, B, H, N, D), random(1, B, H, M, D), random(2, B, H, M, D)


MASK = torch.where(random(3, B, 1, N, M) > 1, -1e4, 0.0)


def products(
    bits: int = 6, probability_bits: int = 5, steps: int = STEPS, log2: bool = True
) -> QuantAttention:
    """Every other row has the log2 grid (with one row: none, or that one)."""
    built = QuantAttention(bits, probability_bits, StepContext(StepGrid(torch.arange(STEPS) * 10)))
    built.resize(steps)
    spread = torch.linspace(0.8, 1.3, steps)
    for quantizer in built.activation_quantizers:
        quantizer.scale.data.copy_(6 * spread / 2**bits)
        quantizer.zero_point.data.fill_(2 ** (bits - 1) - 0.3)
    built.probabilities.log2[::2] = log2
    uniform = 0.9 * spread / 2**probability_bits
    built.probabilities.scale.data.copy_(
        torch.where(built.probabilities.log2, 0.9 * spread, uniform)
    )
    built.quantizing = True
    return built


def at(attention: QuantAttention, timestep: object) -> QuantAttention:
    attention.context.set_timestep(torch.tensor(timestep))
    return attention


def test_not_quantizing_it_is_float_attention():
    attention = products()
    attention.quantizing = False
    expected = functional.scaled_dot_product_attention(*operands(), MASK)
    assert torch.equal(at(attention, 10)(*operands(), MASK), expected)
    probabilities = attention.float_probabilities(*operands()[:2], MASK)
    torch.testing.assert_close(probabilities @ operands()[2], expected)


TIMES = {"one step": 0, "a uniform step": 10, "mixed": [30, 0, 10, 0]}


@pytest.mark.parametrize("timestep", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all seen", "masked"])
@pytest.mark.parametrize("steps", [STEPS, 1], ids=["steps", "static"])
def test_integers_give_what_the_gradient_path_does(timestep, bits, mask, steps):
    attention = at(products(bits, bits, steps), timestep)
    simulated = attention(*operands(), mask)
    assert simulated.requires_grad
    with torch.no_grad():
        integers = attention(*operands(), mask)
    # A score that is rounded otherwise may move one probability to the next level.
    differing = (simulated - integers).abs() > 1e-5
    assert differing.float().mean() < 0.02
    torch.testing.assert_close(integers, simulated.detach(), rtol=0, atol=0.2)
    exact = functional.scaled_dot_product_attention(*operands(), mask)
    assert not torch.allclose(integers, exact, atol=1e-3)


@pytest.mark.parametrize("grad", [False, True], ids=["integers", "gradients"])
def test_each_sample_has_its_own_row(grad):
    attention, times = products(), [30, 0, 10, 0]
    with torch.set_grad_enabled(grad):
        together = at(attention, times)(*operands(), MASK)
        for sample, timestep in enumerate(times):
            one = slice(sample, sample + 1)
            alone = at(attention, timestep)(*(x[one] for x in operands()), MASK[one])
            torch.testing.assert_close(together[one], alone, rtol=1e-6, atol=1e-6)
        other = at(attention, 30)(*operands(), MASK)
    assert not torch.allclose(together[1], other[1], atol=1e-3)


def test_rows_serve_neighbours_and_a_batch_that_does_not_divide_is_refused():
    attention = products()
    times, pairs = [30, 0], [30, 30, 0, 0]
    assert torch.equal(at(attention, times)(*operands()), at(attention, pairs)(*operands()))
    at(attention, [0, 10, 20])
    with pytest.raises(StepQuantError, match="batch dimension of 4 with 3 timesteps"):
        attention(*operands())


def through(rounded: Tensor, smooth: Tensor) -> Tensor:
    """The value of `rounded`, the gradient of `smooth`."""
    return smooth + (rounded - smooth).detach()


def affine(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The affine grid, with autograd through everything but the rounding."""
    ratio = x / scale
    zero = through(torch.round(zero), zero)
    codes = (through(torch.round(ratio), ratio) + zero).clamp(0, 2**bits - 1)
    return (codes - zero) * scale


@pytest.mark.parametrize("timestep", [10, [10, 30, 10, 30]], ids=str)
def test_gradients_are_those_of_autograd_through_the_rounding(timestep):
    """In float64, for uniform grids; every table and operand."""
    attention = at(products(4, 4).double(), timestep)
    x = [tensor.double().requires_grad_() for tensor in operands()]
    weights = random(9, B, H, N, D).double()
    (attention(*x, MASK) * weights).sum().backward()
    found = [tensor.grad for tensor in x]
    tables = list(attention.parameters())
    found += [table.grad for table in tables]

    rows = attention.context.rows
    x = [tensor.detach().requires_grad_() for tensor in x]
    copies = [table.detach().clone().requires_grad_() for table in tables]
    gathered = [table[rows].view(-1, 1, 1, 1) for table in copies]
    q, k, v = (affine(x[i], gathered[2 * i], gathered[2 * i + 1], 4) for i in range(3))
    probabilities = torch.softmax(q @ k.transpose(-1, -2) * D**-0.5 + MASK, dim=-1)
    scale = gathered[6]
    ((affine(probabilities, scale, torch.zeros_like(scale), 4) @ v) * weights).sum().backward()
    assert [name for name, _ in attention.named_parameters()][6] == "probabilities.scale"
    expected = [tensor.grad for tensor in (*x, *copies)]
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    untouched = sorted(set(range(STEPS)) - set(rows.tolist()))
    for table in tables:
        assert not table.grad[untouched].any()


def test_the_gradient_for_values_is_that_of_finite_differences():
    """What passes no rounding that moves: values whose codes are clipped, and their scale."""
    attention = at(products(4, 4).double(), 0)
    scale = attention.activation_quantizers[2].scale
    q, k, _ = (tensor.double() for tensor in operands())
    v = torch.full((B, H, M, D), 100.0, dtype=torch.float64)  # all above the grid
    weights = random(9, B, H, N, D).double()

    def loss() -> Tensor:
        return (attention(q, k, v) * weights).sum()

    loss().backward()
    step = 1e-6
    with torch.no_grad():
        scale[0] += step
    above = loss().item()
    with torch.no_grad():
        scale[0] -= 2 * step
    below = loss().item()
    assert scale.grad[0].item() == pytest.approx((above - below) / (2 * step), rel=1e-6)


def test_rows_with_the_log2_grid_have_its_levels_and_its_gradient():
    quantizer = ProbabilityQuantizer(3, 2)
    quantizer.log2[1] = True
    quantizer.scale.data.copy_(torch.tensor([1 / 7, 0.8]))
    p = torch.softmax(2 * random(4, 2, 3, 8), dim=-1).requires_grad_()
    y = quantizer(p, torch.tensor([0, 1]))
    zero = torch.zeros(())
    uniform = dequantize(quantize(p[0], quantizer.scale[0], zero, 3), quantizer.scale[0], zero)
    log2 = dequantize_log2(quantize_log2(p[1], quantizer.scale[1], 3), quantizer.scale[1], 3)
    assert torch.equal(y[0], uniform) and torch.equal(y[1], log2)
    y.sum().backward()
    assert torch.isfinite(p.grad).all() and torch.isfinite(quantizer.scale.grad).all()
    inside = (log2 > 0) & (p[1] < quantizer.scale[1])
    torch.testing.assert_close(p.grad[1][inside], (log2 / p[1])[inside])
    assert not p.grad[1][log2 == 0].any()


def test_resized_tables_repeat_the_first_row():
    attention = products(steps=1)
    before = copy.deepcopy(attention)
    attention.resize(3)
    for tables, old in zip(attention.parameters(), before.parameters(), strict=True):
        assert tables.tolist() == old.tolist() * 3
        assert tables.requires_grad
    assert attention.probabilities.log2.tolist() == [True] * 3
    assert attention.probabilities.steps == 3
    assert "log2" in dict(attention.probabilities.named_buffers())
    assert torch.equal(at(attention, 20)(*operands()), at(before, 20)(*operands()))


@pytest.mark.parametrize(("bits", "probability_bits"), [(9, 8), (8, 0)], ids=str)
def test_bits_out_of_range_are_refused(bits, probability_bits):
    with pytest.raises(StepQuantError, match="expected a whole number of bits from 1 to 8"):
        QuantAttention(bits, probability_bits, StepContext(StepGrid(torch.arange(2))))
