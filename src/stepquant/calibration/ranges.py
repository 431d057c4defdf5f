"""Range initialisation: minimum and maximum, or a search for the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics import (
    WEIGHT_ZERO_POINT_8BIT,
    dequantize,
    fake_quantize,
    max_code,
    quantize,
    range_to_grid,
    scale_of,
)

ERROR_POWER = 2.4  # |error|^2.4, as in LAPQ, BRECQ and the works that build on them
SHRINK = torch.linspace(1.0, 0.2, 41)
# Four levels on a bell-shaped channel lie best far inside its extremes, two levels farther still.
SHRINK_FEW_BITS = 0.05 ** torch.linspace(0.0, 1.0, 48)  # each 6 % below the one before
FEW_BITS = 3


def grid_error(
    values: Tensor, low: Tensor, high: Tensor, bits: int, power: float, weights: Tensor | None
) -> Tensor:
    """Mean `|x - fake_quantize(x)|^power` of each row of `values [R, n]`, for `[R]` ranges.

    `weights [R, n]` says how many values each stands for; None counts all alike.
    """
    scale, zero_point = range_to_grid(low, high, bits)
    scale, zero_point = scale[:, None], zero_point[:, None]
    approximation = dequantize(quantize(values, scale, zero_point, bits), scale, zero_point)
    error = (values - approximation).abs_().pow_(power)
    if weights is None:
        return error.mean(dim=1)
    return error.mul_(weights).sum(dim=1) / weights.sum(dim=1)


def search_activation_range(
    values: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int,
    power: float = ERROR_POWER,
    weights: Tensor | None = None,
    factors: Tensor = SHRINK,
) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[R]`, of the least error on `values [R, n]`.

    `low` and `high` `[R]` are the exact extremes; `values` may be a sample, of which each stands
    for `weights [R, n]` values. Both ends first
    shrink together by `factors`, then each alone, twice: the two tails of what follows a SiLU
    differ by far. Rows are independent. (The works in this line search the ends together only, or
    range and zero point over a grid.)
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    best = grid_error(values, low, high, bits, power, weights)
    best_low, best_high = low.clone(), high.clone()

    def consider(try_low: Tensor, try_high: Tensor) -> None:
        nonlocal best
        error = grid_error(values, try_low, try_high, bits, power, weights)
        better = error < best
        best = torch.where(better, error, best)
        best_low[better], best_high[better] = try_low[better], try_high[better]

    for factor in factors:
        consider(low * factor, high * factor)
    for _ in range(2):
        for factor in factors[::2]:
            consider(best_low, high * factor)
        for factor in factors[::2]:
            consider(low * factor, best_high)
    return range_to_grid(best_low, best_high, bits)


def search_symmetric_range(
    weight: Tensor, bits: int, zero_point: float, factors: Tensor, power: float = ERROR_POWER
) -> tuple[Tensor, Tensor, Tensor]:
    """`(scale, zero_point, error)`, each `[C_out]`, of ranges that lie symmetrically around zero.

    `zero_point` is 128 for 8 bits. Half-way between two codes it gives 1 bit the levels -1/2 and
    1/2 and 2 bits -3/2 to 3/2, in units of the scale. The range shrinks by `factors`.
    """
    zero = torch.full_like(weight[:, 0], zero_point)
    bound = weight.abs().amax(dim=1)
    best, best_scale = torch.full_like(bound, torch.inf), torch.ones_like(bound)
    for factor in factors:
        scale = scale_of(bound * factor, max_code(bits) - zero_point)
        codes = quantize(weight, scale[:, None], zero[:, None], bits, halves=True)
        error = weight - dequantize(codes, scale[:, None], zero[:, None])
        error = error.abs_().pow_(power).mean(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale, zero, best


def search_few_levels(
    weight: Tensor, bits: int, power: float = ERROR_POWER
) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[C_out]`: levels with a zero among them, or around zero.

    Each out-channel of `weight [C_out, K]` takes the kind that has the smaller error.
    """
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    scale, zero = search_activation_range(weight, low, high, bits, power, None, SHRINK_FEW_BITS)
    approximation = fake_quantize(weight, scale[:, None], zero[:, None], bits)
    error = (weight - approximation).abs().pow(power).mean(dim=1)
    other_scale, other_zero, other_error = search_symmetric_range(
        weight, bits, max_code(bits) / 2, SHRINK_FEW_BITS, power
    )
    better = other_error < error
    return torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)


def search_weight_range(
    weight: Tensor, bits: int, power: float = ERROR_POWER
) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[C_out]`, of the least error on `weight [C_out, K]`.

    Up to three bits the levels may lie symmetrically around zero, with zero points half-way between
    two codes (a choice of ours: no paper's).
    """
    if bits <= FEW_BITS:
        return search_few_levels(weight, bits, power)
    if bits < 8:
        low, high = weight.amin(dim=1), weight.amax(dim=1)
        return search_activation_range(weight, low, high, bits, power)
    return search_symmetric_range(weight, bits, WEIGHT_ZERO_POINT_8BIT, SHRINK, power)[:2]
