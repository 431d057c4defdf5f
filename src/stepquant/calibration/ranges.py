"""Search for the quantization range with the least error."""

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
# For a bell-shaped channel, the best four levels lie far inside its extremes, two even farther.
SHRINK_FEW_BITS = 0.05 ** torch.linspace(0.0, 1.0, 48)  # each 6 % below the previous one
FEW_BITS = 3


def grid_error(
    values: Tensor, low: Tensor, high: Tensor, bits: int, power: float, weights: Tensor | None
) -> Tensor:
    """Return the mean `|x - fake_quantize(x)|^power` of each row of `values [R, n]`, as `[R]`.

    Row `r` is quantized to `bits` bits on the range `low[r]` to `high[r]`. `weights [R, n]` is the
    number of values that each entry stands for; None weights all entries equally.
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
    """Return `(scale, zero_point)`, each `[R]`, with the least error on `values [R, n]`.

    `low` and `high`, each `[R]`, are the exact extremes. `values` may be a sample; each entry then
    stands for `weights [R, n]` values. The error is the mean of `|error|^power`. Rows are
    independent.

    The search first shrinks both ends together by `factors`, then each end alone, twice, because
    the two tails after a SiLU differ strongly. (Comparable works search both ends together only, or
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
    """Search for the best range that is symmetric around zero, for each row of `weight [C_out, K]`.

    Returns `(scale, zero_point, error)`, each `[C_out]`; the error is the mean of `|error|^power`.
    The search shrinks the range by `factors`. `zero_point` is 128 for 8 bits. If it lies half-way
    between two codes, the levels in units of the scale are -1/2 and 1/2 for 1 bit, and -3/2 to 3/2
    for 2 bits.
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
    """Return `(scale, zero_point)`, each `[C_out]`, for weights of few bits.

    The function searches two kinds of grids: grids with a level at zero, and grids symmetric around
    zero. Each out-channel of `weight [C_out, K]` takes the kind with the smaller error.
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
    """Return `(scale, zero_point)`, each `[C_out]`, with the least error on `weight [C_out, K]`.

    Up to 3 bits, the levels may be symmetric around zero, with zero points half-way between two
    codes. (This is our own choice; no paper proposes it.) At 8 bits, the zero point is 128.
    """
    if bits <= FEW_BITS:
        return search_few_levels(weight, bits, power)
    if bits < 8:
        low, high = weight.amin(dim=1), weight.amax(dim=1)
        return search_activation_range(weight, low, high, bits, power)
    return search_symmetric_range(weight, bits, WEIGHT_ZERO_POINT_8BIT, SHRINK, power)[:2]
