from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.calibration.ranges import (
    ERROR_POWER,
    SHRINK,
    grid_error,
    search_activation_range,
    search_weight_range,
)
from stepquant.numerics import dequantize, max_code, quantize, range_to_grid
from stepquant.quantizers.weight import weight_grid

KINDS = ["normal", "heavy", "one-sided", "outlier", "constant", "zero"]


def rows(kind: str, seed: int, count: int = 3, size: int = 64) -> torch.Tensor:
    """`[count, size]` values of a kind that occurs in a denoiser, or that is hard."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator)
    if kind == "heavy":
        return x * torch.randn(count, size, generator=generator).mul(2).exp()
    if kind == "one-sided":
        return torch.nn.functional.silu(3 * x)
    if kind == "outlier":
        x[:, 0] = 100.0
    if kind == "constant":
        return torch.full_like(x, 0.3)
    return torch.zeros_like(x) if kind == "zero" else x


def error_of(values, scale, zero_point, bits, power=ERROR_POWER):
    """Mean `|x - x on the grid|^power` of each row, in float64."""
    scale, zero_point = scale[:, None], zero_point[:, None]
    found = dequantize(quantize(values, scale, zero_point, bits), scale, zero_point)
    return (values - found).double().abs().pow(power).mean(dim=1)


problems = st.tuples(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(1, 8))


@settings(max_examples=50)
@given(problems)
def test_minmax_covers_every_value_to_half_a_grid_step(problem):
    kind, seed, bits = problem
    values = rows(kind, seed)
    scale, zero_point = range_to_grid(values.amin(dim=1), values.amax(dim=1), bits)
    found = dequantize(
        quantize(values, scale[:, None], zero_point[:, None], bits),
        scale[:, None],
        zero_point[:, None],
    )
    # Half a step from rounding the value, another half from rounding the zero point.
    assert ((found - values).abs() <= scale[:, None] * 1.001).all()


@settings(max_examples=50)
@given(problems)
def test_grid_error_is_the_mean_power_of_the_error(problem):
    kind, seed, bits = problem
    values = rows(kind, seed)
    low, high = values.amin(dim=1), values.amax(dim=1)
    expected = error_of(values, *range_to_grid(low, high, bits), bits)
    found = grid_error(values, low, high, bits, ERROR_POWER, None)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-12)


@settings(max_examples=25)
@given(problems)
def test_the_search_over_activations_is_never_worse_than_minmax(problem):
    kind, seed, bits = problem
    values = rows(kind, seed)
    low, high = values.amin(dim=1), values.amax(dim=1)
    searched = error_of(values, *search_activation_range(values, low, high, bits), bits)
    minmax = error_of(values, *range_to_grid(low, high, bits), bits)
    assert (searched <= minmax * (1 + 1e-5)).all()


@settings(max_examples=25)
@given(problems)
def test_the_search_over_weights_is_never_worse_than_minmax(problem):
    kind, seed, bits = problem
    weight = rows(kind, seed)
    searched = error_of(weight, *search_weight_range(weight, bits), bits)
    minmax = error_of(weight, *weight_grid(weight.amin(dim=1), weight.amax(dim=1), bits), bits)
    assert (searched <= minmax * (1 + 1e-5)).all()


def searched_by_hand(values: torch.Tensor, bits: int) -> tuple[float, float]:
    """The ends of least error for one row `[n]`: the same candidates, one after another."""
    row = values.view(1, -1)
    low, high = row.amin(dim=1).clamp(max=0), row.amax(dim=1).clamp(min=0)
    best = (float(grid_error(row, low, high, bits, ERROR_POWER, None)), low, high)

    def consider(a, b):
        nonlocal best
        error = float(grid_error(row, a, b, bits, ERROR_POWER, None))
        if error < best[0]:
            best = (error, a, b)

    for factor in SHRINK:
        consider(low * factor, high * factor)
    for _ in range(2):
        for factor in SHRINK[::2]:
            consider(best[1], high * factor)
        for factor in SHRINK[::2]:
            consider(low * factor, best[2])
    return best[1], best[2]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_searched_one_by_one(kind, bits):
    values = rows(kind, seed=5, count=4)
    scale, zero_point = search_activation_range(
        values, values.amin(dim=1), values.amax(dim=1), bits
    )
    for row in range(len(values)):
        expected = range_to_grid(*searched_by_hand(values[row], bits), bits)
        assert (scale[row], zero_point[row]) == expected


def test_a_weight_counts_as_that_many_values():
    values = rows("heavy", seed=1)
    weights = torch.randint(1, 4, values.shape, generator=torch.Generator().manual_seed(0))
    low, high = values.amin(dim=1), values.amax(dim=1)
    for row in range(len(values)):
        repeated = values[row].repeat_interleave(weights[row]).view(1, -1)
        ends = low[row : row + 1], high[row : row + 1]
        scale, zero_point = search_activation_range(
            values[row : row + 1], *ends, 4, weights=weights[row : row + 1].float()
        )
        assert (scale, zero_point) == search_activation_range(repeated, *ends, 4)
        found = grid_error(
            values[row : row + 1], *ends, 4, ERROR_POWER, weights[row : row + 1].float()
        )
        torch.testing.assert_close(found, grid_error(repeated, *ends, 4, ERROR_POWER, None))


def test_the_two_ends_shrink_apart():
    """One far outlier above: cutting it must not cost the lower end its values."""
    values = torch.linspace(-1.0, 1.0, 4000).view(1, -1).clone()
    values[0, 0] = 6.0
    scale, zero_point = search_activation_range(values, values.amin(dim=1), values.amax(dim=1), 4)
    low = float(-scale * zero_point)
    high = float(scale * (15 - zero_point))
    assert low <= -0.9
    assert high <= 4.0


def test_extremes_may_lie_outside_the_sample_of_values():
    values = torch.linspace(0.0, 1.0, 50).view(1, -1)
    scale, zero_point = search_activation_range(values, torch.tensor([0.0]), torch.tensor([3.0]), 4)
    assert zero_point.item() == 0
    assert scale.item() * 15 == pytest.approx(1.0, abs=0.05)


def test_heavy_tails_are_cut_and_even_ones_are_not():
    even = torch.linspace(-1, 1, 4000).view(1, -1)
    spiked = torch.cat([even, torch.tensor([[6.0]])], dim=1)
    for values, low, high in ((even, 0.9, 1.0), (spiked, 0.0, 0.7)):
        full, _ = range_to_grid(values.amin(dim=1), values.amax(dim=1), 4)
        scale, _ = search_activation_range(values, values.amin(dim=1), values.amax(dim=1), 4)
        assert low <= float(scale / full) <= high


@pytest.mark.parametrize("kind", KINDS)
def test_eight_bit_weights_are_symmetric(kind):
    weight = rows(kind, seed=2)
    scale, zero_point = search_weight_range(weight, 8)
    assert zero_point.tolist() == [128.0] * 3
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    # The best of the symmetric candidates, found row by row.
    bound = weight.abs().amax(dim=1)
    for row in range(3):
        errors = [
            error_of(weight[row : row + 1], *weight_grid(-b, b, 8), 8).item()
            for b in (bound[row : row + 1] * factor for factor in SHRINK)
        ]
        found = error_of(weight[row : row + 1], scale[row : row + 1], zero_point[:1], 8)
        assert found.item() <= min(errors) * (1 + 1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_weights_of_fewer_bits_are_affine(bits):
    weight = rows("one-sided", seed=4)
    scale, zero_point = search_weight_range(weight, bits)
    assert torch.equal(zero_point, zero_point.round())
    assert (zero_point >= 0).all()
    assert (zero_point <= max_code(bits) / 2).all()  # the larger side is the positive one
    assert (scale > 0).all()


def test_the_largest_float_numbers_give_a_finite_grid():
    values = torch.tensor([[1e30, -1e30, 3e29, 0.0]])
    for grid in (
        search_activation_range(values, values.amin(dim=1), values.amax(dim=1), 8),
        search_weight_range(values, 8),
        search_weight_range(values, 4),
    ):
        assert all(torch.isfinite(part).all() for part in grid)
        assert (grid[0] > 0).all()


def remaining_error(weight, scale, zero_point, bits):
    codes = quantize(weight, scale[:, None], zero_point[:, None], bits, halves=True)
    real = dequantize(codes, scale[:, None], zero_point[:, None])
    return (weight - real).abs().pow(2.4).mean(dim=1)


@pytest.mark.parametrize(("bits", "gain"), [(1, 0.65), (2, 0.9)])
def test_few_bits_on_a_bell_take_symmetric_levels(bits, gain):
    weight = torch.randn(16, 600, generator=torch.Generator().manual_seed(0))
    scale, zero_point = search_weight_range(weight, bits)
    assert (zero_point == (2**bits - 1) / 2).float().mean() > 0.5
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    whole = search_activation_range(weight, low, high, bits)
    ratio = remaining_error(weight, scale, zero_point, bits) / remaining_error(weight, *whole, bits)
    assert ratio.mean() < gain and ratio.max() <= 1


def test_two_levels_on_a_bell_are_its_mean_magnitude():
    """The least squares solution of a binary weight (XNOR-Net, equation 6), here for |error|^2."""
    weight = torch.randn(4, 20_000, generator=torch.Generator().manual_seed(0))
    scale, _ = search_weight_range(weight, 1, power=2.0)
    torch.testing.assert_close(scale / 2, weight.abs().mean(dim=1), rtol=0.05, atol=0)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_a_channel_of_zeros_stays_zero(bits):
    weight = torch.zeros(1, 20)
    scale, zero_point = search_weight_range(weight, bits)
    assert remaining_error(weight, scale, zero_point, bits).item() == 0
