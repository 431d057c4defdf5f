"""Attention's products on whole numbers, against int64 and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepquant.numerics.attention_products import (
    AttentionGrids,
    attention_of_differences,
    probability_levels,
    sum_of_products,
)

B, H, N, M, D = 3, 2, 4, 6, 8


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def codes(bits: int, *shape: int) -> Tensor:
    """Random differences of `bits` bits, both extremes among them."""
    largest = 2**bits - 1
    generator = torch.Generator().manual_seed(bits)
    drawn = torch.randint(-largest, largest + 1, shape, generator=generator)
    drawn.view(-1)[:2] = torch.tensor([largest, -largest])
    return drawn.float()


def operands(bits: int) -> tuple[Tensor, Tensor, Tensor]:
    return codes(bits, B, H, N, D), codes(bits, B, H, M, D), codes(bits, B, H, M, D)


def grids(bits: int, probability_bits: int, log2: list[bool] | None) -> AttentionGrids:
    """Scores of about 1, whatever the bits."""
    scale = 1.5 / 2**bits
    return AttentionGrids(
        query=column(scale, 2 * scale, scale),
        key=column(scale, scale, 3 * scale),
        value=column(0.01, 0.02, 0.03),
        probability=column(1.0, 0.9, 0.8) if log2 else column(*[0.7 / 2**probability_bits] * 3),
        log2=None if log2 is None else torch.tensor(log2).view(-1, 1, 1, 1),
        bits=bits,
        probability_bits=probability_bits,
    )


def brute_force(
    query: Tensor, key: Tensor, value: Tensor, grids: AttentionGrids, mask: Tensor | None
) -> Tensor:
    """One number after the other: sums in int64 or float64, levels by search in a list.

    The softmax is float32, as it is part of what is specified; all else is float64.
    """
    result = torch.zeros(B, H, N, D, dtype=torch.float64)
    total = torch.einsum("bhnd,bhmd->bhnm", query.long(), key.long())
    scores = total.float() * (grids.query * grids.key * D**-0.5)
    probabilities = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    largest = 2**grids.probability_bits - 1
    for b in range(B):
        scale = float(grids.probability[b])
        log2 = grids.log2 is not None and bool(grids.log2[b])
        for index in torch.cartesian_prod(*(torch.arange(size) for size in (H, N, M))).tolist():
            h, n, m = index
            ratio = float(probabilities[b, h, n, m] * (1 / grids.probability[b]).squeeze())
            if log2:
                code = round(-float(torch.tensor(ratio).double().log2())) if ratio else largest
                code = min(max(code, 0), largest)
                level = 0.0 if code == largest else 2.0**-code
            else:
                level = min(round(ratio), largest)
            result[b, h, n] += level * value[b, h, m].double()
        result[b] *= scale * float(grids.value[b])
    return result


MASK = torch.zeros(B, 1, 1, M)
MASK[0, ..., 4:] = -torch.inf
MASK[1, ..., 1] = -2.5
ROWS = {
    "uniform": None,
    "log2": [True, True, True],
    "mixed": [True, False, True],
}


@pytest.mark.parametrize("log2", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all seen", "masked"])
@pytest.mark.parametrize(("bits", "probability_bits"), [(8, 8), (8, 3), (4, 8), (2, 2)], ids=str)
def test_attention_is_that_of_brute_force(bits, probability_bits, mask, log2):
    these, q_k_v = grids(bits, probability_bits, log2), operands(bits)
    found = attention_of_differences(*q_k_v, these, mask)
    assert found.dtype == torch.float32 and found.shape == (B, H, N, D)
    expected = brute_force(*q_k_v, these, mask)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("length", "largest"), [(258, 255**2), (259, 255**2), (4096, 255**2), (70_000, 255**2)], ids=str
)
def test_sums_of_extreme_codes_are_exact(length, largest):
    """With an odd number at the end float32 would lose it: 70,000 sums go beyond 2^32."""
    a = torch.full((1, length), 255.0)
    b = torch.full((length, 1), -255.0)
    a[0, 0], b[0, 0] = 1, 1
    exact = 1 - 255**2 * (length - 1)
    assert sum_of_products(a, b, largest).item() == torch.tensor(float(exact)).item()
    if length > 259:
        wide = torch.ones(2, length // 2) * torch.tensor([[1.0], [-1.0]]) * 255
        rows = torch.cat([wide[0], wide[1]])[None]
        rows[0, 0] -= 1  # cancels to -255, after passing sums that float32 cannot hold
        assert sum_of_products(rows, 0 * b + 255, largest).item() == -255


def test_autocast_does_not_round_the_sums():
    a, b = codes(8, 4, 32), codes(8, 32, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = sum_of_products(a, b, 255**2)
    assert found.dtype == torch.float32
    assert torch.equal(found.long(), a.long() @ b.long())


def test_a_case_by_hand():
    """One query, two keys: scores ln 3 and 0, probabilities 3/4 and 1/4."""
    query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[1.0], [0.0]]]])
    value = torch.tensor([[[[4.0], [-8.0]]]])
    unit = column(1.0)
    these = AttentionGrids(column(3.0).log(), unit, column(0.5), column(0.25), None, 4, 4)
    # Levels 3 and 1 of 1/4: (3 * 4 - 8) / 4 / 2.
    assert attention_of_differences(query, key, value, these, None).item() == 0.5
    # Codes 0 and 2 below 1: 3/4 is above sqrt(1/2) and becomes 1. (4 - 8 / 4) / 2.
    log2 = replace(these, probability=unit, log2=column(1).bool())
    assert attention_of_differences(query, key, value, log2, None).item() == 1
    # The other key alone: probability 1 is the last of 3 levels, 3/4 in units of 1/4.
    mask = torch.tensor([-torch.inf, 0.0])
    clipped = replace(these, probability_bits=2)
    assert attention_of_differences(query, key, value, clipped, mask).item() == -8 * 0.75 / 2


def test_each_sample_has_the_levels_of_its_own_grid():
    """A uniform sample beside a log2 one has the levels that it has alone."""
    probabilities = torch.softmax(codes(4, B, H, N, M) / 4, dim=-1)
    mixed = probability_levels(probabilities, grids(8, 4, [True, False, True]))
    uniform = probability_levels(probabilities, replace(grids(8, 4, [False] * 3), log2=None))
    log2 = probability_levels(probabilities, grids(8, 4, [True] * 3))
    assert torch.equal(mixed[1], uniform[1])
    assert torch.equal(mixed[[0, 2]], log2[[0, 2]])
    assert not torch.equal(uniform, log2)
