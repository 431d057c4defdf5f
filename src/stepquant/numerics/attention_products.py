"""Attention's two matrix products on quantized operands, in whole-number arithmetic.

Operands hold `code - zero_point` as float32. Sums of their products are exact below 2^24 in float32
and below 2^53 in float64. The largest sum that can occur selects the dtype.

Shapes: `B` samples, `H` heads, `N` queries, `M` keys, `D` channels per head. Scales are
`[1, 1, 1, 1]` or `[B, 1, 1, 1]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.numerics.affine import quantize
from stepquant.numerics.bits import max_code
from stepquant.numerics.log2 import dequantize_log2, quantize_log2

EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class AttentionGrids:
    """Grids of queries, keys, values and probabilities.

    - `query`, `key`, `value`, `probability`: scales, `[1, 1, 1, 1]` or `[B, 1, 1, 1]`.
    - `log2`: bool, in the shape of the scales. True selects the log2 grid (`numerics.log2`) for the
      probabilities, False a uniform grid from zero. None means that all grids are uniform.
    - `bits`: bits of queries, keys and values.
    - `probability_bits`: bits of the probabilities.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    probability: Tensor
    log2: Tensor | None
    bits: int
    probability_bits: int


def sum_of_products(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """Return `a @ b` in float32, for whole numbers whose products are at most `largest`.

    If a sum could reach 2^24, the product runs in float64. The result is then exact up to the last
    rounding to float32, as long as the sum stays below 2^53. Autocast does not change it.
    """
    if a.shape[-1] * largest >= EXACT_IN_FLOAT32:
        return (a.double() @ b.double()).float()
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def probability_levels(probabilities: Tensor, grids: AttentionGrids) -> Tensor:
    """Round `probabilities` to their grids and return the levels in units of the scale.

    Levels are whole numbers on a uniform grid, and powers of two or zero on a log2 grid.
    """
    scale, bits = grids.probability, grids.probability_bits
    uniform = quantize(probabilities, scale, torch.zeros_like(scale), bits)
    if grids.log2 is None:
        return uniform
    codes = quantize_log2(probabilities, scale, bits)
    return torch.where(grids.log2, dequantize_log2(codes, torch.ones_like(scale), bits), uniform)


def attention_of_differences(
    query: Tensor, key: Tensor, value: Tensor, grids: AttentionGrids, mask: Tensor | None
) -> Tensor:
    """Return scaled dot-product attention of quantized operands, float32 `[B, H, N, D]`.

    `query [B, H, N, D]`, `key` and `value` `[B, H, M, D]` hold `code - zero_point`. `mask` is added
    to the scores. Scores and softmax are float32. The probabilities are quantized before the second
    product.

    Products with log2 probabilities are summed in float64. Up to 5 probability bits these sums are
    exact. With more bits, the error is too small to show in float32.
    """
    largest = max_code(grids.bits)
    total = sum_of_products(query, key.transpose(-1, -2), largest * largest)
    scores = total * (grids.query * grids.key * query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores + mask
    levels = probability_levels(torch.softmax(scores, dim=-1), grids)
    most = EXACT_IN_FLOAT32
    if grids.log2 is None:
        most = max_code(grids.probability_bits) * largest
    return sum_of_products(levels, value, most) * (grids.probability * grids.value)
