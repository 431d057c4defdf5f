"""The forms that the functions of `runtime.ops.fused` come in, and what their tests share."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.ops import plain
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.native import Library, build, calls

NAMES = ("group_norm_encode", "encode", "layer_norm_encode", "gated_encode", "epilogue")
NATIVE = tuple(build.LEVELS)
PATHS = ("plain", *NATIVE)

ACTIVATIONS = {
    "none": lambda x: x,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
GRID = Grid(torch.tensor([0.03]), torch.tensor([20], dtype=torch.uint8), None, 255)
TABLE = Grid(
    torch.tensor([0.5, 0.0213, 3.0]),
    torch.tensor([1, 37, 9], dtype=torch.uint8),
    torch.tensor([1]),
    255,
)
COARSE = Grid(torch.tensor([0.3]), torch.tensor([6], dtype=torch.uint8), None, 15)


class Path:
    """The functions of one form: "plain", or a native instruction set."""

    def __init__(self, name: str) -> None:
        if name == "plain":
            for each in NAMES:
                setattr(self, each, getattr(plain, each))
            return
        library = _library(name)
        if isinstance(library, str):
            pytest.skip(library)
        for each in NAMES:
            setattr(self, each, functools.partial(getattr(calls, each), library))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@functools.cache
def _library(level: str) -> Library | str:
    try:
        return Library(level=level)
    except OSError as error:
        return str(error)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def image(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return draw(*shape, seed=seed, dtype=dtype).to(memory_format=torch.channels_last)


def assert_codes(codes: Tensor, y: Tensor, grid: Grid) -> None:
    """`codes` are the ones nearest to `y` float64; close to a tie both are."""
    row = 0 if grid.row is None else int(grid.row)
    places = y / grid.scale[row].double() + grid.zero_point[row]
    assert codes.dtype == torch.uint8 and codes.shape == y.shape
    assert (codes - places.clamp(0, grid.largest)).abs().max() <= 0.5 + 1e-3
    nearest = places.round().clamp(0, grid.largest)
    assert int((codes != nearest).sum()) <= 1 + y.numel() // 1000


def assert_image(codes: Tensor, y: Tensor, grid: Grid, padding: tuple[int, int]) -> None:
    """As `assert_codes`, inside a border of exact zero points."""
    top, left = padding
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert codes.shape == (*y.shape[:2], y.shape[2] + 2 * top, y.shape[3] + 2 * left)
    inner = codes[:, :, top : top + y.shape[2], left : left + y.shape[3]]
    assert_codes(inner, y, grid)
    zero = grid.zero_point[0 if grid.row is None else int(grid.row)]
    border = torch.ones(codes.shape, dtype=torch.bool)
    border[:, :, top : top + y.shape[2], left : left + y.shape[3]] = False
    assert bool((codes[border] == zero).all())
