"""The native attention against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.runtime.ops import native
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.native import Library
from stepquant.runtime.ops.native.attention_call import attention_codes
from stepquant.support.errors import StepQuantError

GRID = Grid(torch.tensor([0.011]), torch.tensor([130], dtype=torch.uint8), None, 255)
TABLE = Grid(
    torch.tensor([9.0, 0.02]), torch.tensor([0, 90], dtype=torch.uint8), torch.tensor([1]), 255
)
# batch, queries, keys, heads, head_dim
SHAPES = {
    "one-key": (1, 3, 1, 1, 8),
    "whole-blocks": (2, 64, 256, 2, 64),
    "odd-numbers": (2, 37, 77, 3, 40),
    "just-over-a-block": (1, 33, 257, 2, 72),
    "many-keys": (1, 70, 1000, 1, 80),
    "wide-heads": (2, 50, 40, 1, 256),
    "two-dimensions": (1, 5, 9, 4, 2),
}


@pytest.fixture(scope="module")
def loaded() -> Library:
    library = native.library()
    if library is None or library.attention is None:
        pytest.skip(str(native.why_not() or "no AMX on this machine"))
    return library


def inputs(shape: tuple[int, ...], spread: float = 1.0) -> list[Tensor]:
    batch, queries, keys, heads, head_dim = shape
    generator = torch.Generator().manual_seed(11)
    return [
        (spread * torch.randn(batch, rows, heads * head_dim, generator=generator)).to(
            torch.bfloat16
        )
        for rows in (queries, keys, keys)
    ]


def places(query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid) -> Tensor:
    """Where the exact result lies on the grid, float64."""
    q, k, v = (
        each.double().unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value)
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    y = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    row = 0 if grid.row is None else int(grid.row)
    return y / grid.scale[row].double() + grid.zero_point[row]


def assert_near(codes: Tensor, exact: Tensor, steps: float) -> None:
    assert codes.dtype == torch.uint8 and codes.shape == exact.shape
    assert (codes - exact.clamp(0, 255)).abs().max() <= 0.5 + steps


@pytest.mark.parametrize("grid", [GRID, TABLE], ids=["grid", "table"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_codes_are_near_the_exact_result(
    loaded: Library, shape: tuple[int, ...], grid: Grid
) -> None:
    q, k, v = inputs(shape)
    codes = attention_codes(loaded, q, k, v, shape[3], grid)
    # Exponentials are rounded to bfloat16: 2^-9 of the largest value, in steps of the grid.
    steps = float(v.abs().max()) * 2**-9 / float(grid.scale[-1])
    assert_near(codes, places(q, k, v, shape[3], grid), steps)


@pytest.mark.parametrize("spread", [1e-3, 30.0])
def test_flat_and_sharp_scores(loaded: Library, spread: float) -> None:
    """With sharp ones, later keys raise the largest score by hundreds."""
    q, k, v = inputs((1, 40, 600, 1, 64))
    codes = attention_codes(loaded, spread * q, k, v, 1, GRID)
    exact = places(spread * q, k, v, 1, GRID)
    assert_near(codes, exact, float(v.abs().max()) * 2**-8 / 0.011)


def test_scores_that_rise_and_fall_by_thousands(loaded: Library) -> None:
    q = torch.ones(1, 33, 16, dtype=torch.bfloat16)
    k = torch.ones(1, 800, 16) * torch.linspace(-3000, 3000, 800).roll(250)[None, :, None]
    _, _, v = inputs((1, 33, 800, 1, 16))
    k = k.to(torch.bfloat16)
    codes = attention_codes(loaded, q, k, v, 1, GRID)
    assert_near(codes, places(q, k, v, 1, GRID), 0.5)


def test_threads_do_not_change_the_result(loaded: Library) -> None:
    q, k, v = inputs(SHAPES["odd-numbers"])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attention_codes(loaded, q, k, v, 3, GRID))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_inputs_may_be_parts_of_one_tensor(loaded: Library) -> None:
    q, k, v = inputs((2, 50, 50, 2, 32))
    joined = torch.cat([q, k, v], dim=-1)
    parts = joined.split(64, dim=-1)
    expected = attention_codes(loaded, q, k, v, 2, GRID)
    assert torch.equal(attention_codes(loaded, *parts, 2, GRID), expected)
    backwards = [each.flip(0).contiguous().flip(0) for each in (q, k, v)]
    assert torch.equal(attention_codes(loaded, *backwards, 2, GRID), expected)


def test_a_row_outside_the_table_is_refused(loaded: Library) -> None:
    q, k, v = inputs(SHAPES["one-key"])
    with pytest.raises(StepQuantError, match="outside its step table"):
        attention_codes(loaded, q, k, v, 1, TABLE._replace(row=torch.tensor([2])))


def test_keys_of_another_shape_are_refused(loaded: Library) -> None:
    q, k, v = inputs(SHAPES["odd-numbers"])
    with pytest.raises(StepQuantError, match="attention's keys are"):
        attention_codes(loaded, q, k[:, :5], v, 3, GRID)


def test_one_channel_in_another_order(loaded: Library) -> None:
    """Strides of dimensions of size 1 say nothing."""
    q, k, v = inputs((2, 1, 9, 1, 64))
    turned = torch.empty(2, 64, 1, dtype=torch.bfloat16).transpose(1, 2)
    turned.copy_(q)
    expected = attention_codes(loaded, q, k, v, 1, GRID)
    assert torch.equal(attention_codes(loaded, turned, k, v, 1, GRID), expected)
