"""Range initialisation: minimum and maximum, or a search for the least error."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics import dequantize, quantize, range_to_grid
from stepquant.numerics.bits import WEIGHT_ZERO_POINT_8BIT
from stepquant.quantizers.weight import weight_grid

ERROR_POWER = 2.4  # |error|^2.4, as in LAPQ, BRECQ and the works that build on them
SHRINK = torch.linspace(1.0, 0.2, 41)


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
) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[R]`, of the least error on `values [R, n]`.

    `low` and `high` `[R]` are the exact extremes; `values` may be a sample, of which each stands
    for `weights [R, n]` values. Both ends first
    shrink together by 1.0 to 0.2, then each alone, twice: the two tails of what follows a SiLU
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

    for factor in SHRINK:
        consider(low * factor, high * factor)
    for _ in range(2):
        for factor in SHRINK[::2]:
            consider(best_low, high * factor)
        for factor in SHRINK[::2]:
            consider(low * factor, best_high)
    return range_to_grid(best_low, best_high, bits)


def search_weight_range(
    weight: Tensor, bits: int, power: float = ERROR_POWER
) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[C_out]`, of the least error on `weight [C_out, K]`."""
    low, high = weight.amin(dim=1), weight.amax(dim=1)
    if bits < 8:
        return search_activation_range(weight, low, high, bits, power)
    bound = torch.maximum(low.abs(), high.abs())
    best, best_bound = torch.full_like(bound, torch.inf), bound
    for factor in SHRINK:
        scale, _ = weight_grid(-bound * factor, bound * factor, bits)
        zero = torch.full_like(scale, WEIGHT_ZERO_POINT_8BIT)[:, None]
        approximation = dequantize(
            quantize(weight, scale[:, None], zero, bits), scale[:, None], zero
        )
        error = (weight - approximation).abs().pow(power).mean(dim=1)
        better = error < best
        best, best_bound = (
            torch.where(better, error, best),
            torch.where(better, bound * factor, best_bound),
        )
    return weight_grid(-best_bound, best_bound, bits)
