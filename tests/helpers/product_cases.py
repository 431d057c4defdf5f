"""Cases for the native integer products, and how a library of one level computes them."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from emulated_products import MACROS
from kernel_cases import Case, int64_reference
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import Library, build, products, tiled_weight

LEVELS = (*build.X86.product_levels, *build.ARM.product_levels)


def conv(channels: int, out: int, size: int = 3, **more: tuple[int, int]) -> LayerSpec:
    return LayerSpec("conv2d", channels, out, 8, 8, (size, size), **more)


# What the cases of test_kernels.py are too small for.
LARGE = [
    Case("rows-in-place", conv(64, 40, padding=(1, 1)), (2, 3, 16), 9),
    Case("rows-of-48", conv(64, 33, padding=(1, 1)), (1, 5, 48), 200),
    Case("strided-in-place", conv(128, 16, padding=(1, 1), stride=(2, 2)), (1, 6, 32), 3),
    Case("many-chunks", conv(256, 70, padding=(1, 1)), (1, 8, 16), 255, extreme=True),
    Case("many-chunks-gathered", conv(136, 48, padding=(1, 1)), (2, 9, 11), 1),
    Case("one-tile", conv(64, 3, padding=(1, 1)), (4, 28, 28), 77),
    Case("one-by-one-in-place", conv(128, 64, 1), (2, 4, 8), 31),
    Case("tokens", LayerSpec("linear", 192, 100, 8, 8), (2, 77), 4),
    Case("even-tokens", LayerSpec("linear", 320, 64, 4, 4), (3, 64), 7),
    Case("wide", LayerSpec("linear", 4096, 300, 8, 8), (2, 3), 128, extreme=True),
]
# By minimal filtering where there is AVX2 only: whole and parted runs of tiles, one and several
# blocks of runs, and the most channels whose sums fit.
LARGE += [
    Case("filtered-smallest", conv(32, 5, padding=(1, 1)), (1, 8, 8), 17),
    Case("filtered-wide-rows", conv(32, 16, padding=(1, 1)), (2, 4, 70), 128),
    Case("filtered-no-padding", conv(64, 33), (3, 8, 12), 0),
    Case("filtered-many-blocks", conv(96, 20, padding=(1, 1)), (2, 32, 32), 255),
    Case("filtered-extreme", conv(320, 24, padding=(1, 1)), (1, 8, 16), 0, extreme=True),
    Case("filtered-deepest", conv(1792, 16, padding=(1, 1)), (1, 8, 8), 255, extreme=True),
    Case("too-deep-to-filter", conv(1824, 16, padding=(1, 1)), (1, 8, 8), 255, extreme=True),
    Case("odd-height", conv(32, 16, padding=(1, 1)), (1, 9, 8), 40),
    Case("odd-width", conv(32, 16, padding=(1, 1)), (1, 8, 9), 40),
]
# The same with weights of four bits or less, which are unpacked.
FOUR_BITS = [
    replace(
        case,
        name=f"{case.name}-w{bits}",
        spec=replace(case.spec, weight_bits=bits, activation_bits=8),
    )
    for number, case in enumerate(LARGE)
    for bits in ((4,) if number % 3 else (2, 4))
]
LARGE += FOUR_BITS


@functools.cache
def library(level: str) -> Library | str:
    try:
        return Library(product_level=level)
    except OSError as error:
        return str(error)


def form_of(level: str) -> str:
    """How the tests of the level run on this machine."""
    if isinstance(library(level), Library):
        return "real"
    return "emulated" if level in MACROS else "missing"


def grid_of(case: Case, scale: float = 1.0) -> Grid:
    zero_point = torch.tensor([case.act_zero_point], dtype=torch.uint8)
    return Grid(torch.tensor([scale]), zero_point, None, 255)


def run(
    loaded: Library,
    case: Case,
    grid: Grid,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    step_bias: Tensor | None = None,
    added: Tensor | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    gate: Tensor | None = None,
) -> Tensor:
    inputs, spec = case.inputs(), case.spec
    tiles, scale, sums = NATIVE.prepare(inputs["weight"], weight_scale, spec)
    held = tiled_weight.weight_of(tiles, scale, sums, bias, step_bias)
    codes = inputs["codes"]
    if spec.kind == "conv2d":
        codes = pad(codes, torch.tensor([case.act_zero_point]), spec.padding)
    return products.products(loaded, codes, grid, held, spec, added, overwrite, dtype, gate)


@functools.cache
def sums_of(case: Case) -> Tensor:
    inputs = case.inputs()
    return int64_reference(inputs["codes"], inputs["weight"], case.act_zero_point, case.spec)
