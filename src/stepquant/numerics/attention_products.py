"""Attention's two products with operands on their grids, on whole numbers.

Operands are `code - zero point` as float32, so that sums are exact below 2^24 in float32 and below
2^53 in float64; the dtype is chosen by the largest sum that can occur.

Shapes: `B` samples, `H` heads, `N` queries, `M` keys, `D` channels of a head. Scales are
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
    """Scales of queries, keys, values and probabilities, and which probabilities are on log2 grids.

    `log2` is bool of the same shape as the scales: True for the grid of `numerics.log2`, False for
    a uniform grid from zero; None where all are uniform. `bits` of queries, keys and values;
    `probability_bits`.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    probability: Tensor
    log2: Tensor | None
    bits: int
    probability_bits: int


def sum_of_products(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """`a @ b` in float32, for whole numbers whose products are at most `largest`.

    Exact up to the last rounding to float32 wherever the sum is below 2^53, under autocast too.
    """
    if a.shape[-1] * largest >= EXACT_IN_FLOAT32:
        return (a.double() @ b.double()).float()
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def probability_levels(probabilities: Tensor, grids: AttentionGrids) -> Tensor:
    """`probabilities` on their grids, in units of the scale: whole numbers, or powers of two."""
    scale, bits = grids.probability, grids.probability_bits
    uniform = quantize(probabilities, scale, torch.zeros_like(scale), bits)
    if grids.log2 is None:
        return uniform
    codes = quantize_log2(probabilities, scale, bits)
    return torch.where(grids.log2, dequantize_log2(codes, torch.ones_like(scale), bits), uniform)


def attention_of_differences(
    query: Tensor, key: Tensor, value: Tensor, grids: AttentionGrids, mask: Tensor | None
) -> Tensor:
    """Scaled dot-product attention, `[B, H, N, D]` float32.

    `query [B, H, N, D]`, `key` and `value [B, H, M, D]` hold `code - zero point`. `mask` is added
    to the scores. Scores and softmax are float32; probabilities are put on their grid before the
    second product. Products with log2 probabilities are summed in float64: exact to 5 bits, and
    beyond that in error by less than float32 shows.
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
