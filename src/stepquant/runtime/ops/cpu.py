"""The fused passes on the CPU: native kernels if they support the tensors, else torch operations.

The functions take the arguments of their namesakes in `ops.fused`, already checked. Eager code
calls them directly; the `torch.library` operators run them as well.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.runtime.ops import native, plain
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import Library, attention_call, calls, checks, products
from stepquant.runtime.ops.native.tiled_weight import Weight
from stepquant.runtime.ops.result_shapes import empty_result


def group_norm_encode(
    parts: Sequence[Tensor],
    added: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    outputs: Sequence[Output],
) -> list[Tensor]:
    """See `fused.group_norm_encode`."""
    arguments = (parts, added, groups, weight, bias, eps, activation, outputs)
    library = _library(*parts)
    if library is None:
        return plain.group_norm_encode(*arguments)
    return calls.group_norm_encode(library, *arguments)


def encode(x: Tensor, activation: str, output_grid: Grid, padding: tuple[int, int]) -> Tensor:
    """See `fused.encode`."""
    library = _library(x)
    if library is None:
        return plain.encode(x, activation, output_grid, padding)
    return calls.encode(library, x, activation, output_grid, padding)


def layer_norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    grids: Sequence[Grid],
) -> list[Tensor]:
    """See `fused.layer_norm_encode`."""
    library = _library(x)
    if library is None:
        return plain.layer_norm_encode(x, weight, bias, eps, scale, shift, grids)
    return calls.layer_norm_encode(library, x, weight, bias, eps, scale, shift, grids)


def gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> Tensor:
    """See `fused.gated_encode`."""
    library = _library(x)
    if library is None:
        return plain.gated_encode(x, gate_activation, output_grid)
    return calls.gated_encode(library, x, gate_activation, output_grid)


def epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> tuple[Tensor, Tensor]:
    """See `fused.epilogue`."""
    library = _library(sums)
    if library is None:
        return plain.epilogue(grid, sums, bias, step_bias, add_share)
    return calls.epilogue(library, grid, sums, bias, step_bias, add_share)


def tiled_product(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    added: Tensor | None,
    dtype: torch.dtype,
    gate: Tensor | None,
    overwrite: bool = False,
) -> Tensor:
    """See `fused.tiled_product`."""
    if not codes.numel():
        return empty_result(codes, spec, dtype)
    library = native.library()
    if library is None or library.products is None:
        return plain.tiled_product(codes, grid, weight, spec, added, dtype, gate)
    return products.products(library, codes, grid, weight, spec, added, overwrite, dtype, gate)


def tiled_product_codes(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    activation: str,
    gated: bool,
    output_grid: Grid,
) -> Tensor:
    """See `fused.tiled_product_codes`."""
    if not codes.numel():
        y = empty_result(codes, spec, torch.uint8)
        return y[..., : spec.out_channels // 2] if gated else y
    arguments = (codes, grid, weight, spec, activation, gated, output_grid)
    library = native.library()
    if library is None or library.products is None:
        return plain.tiled_product_codes(*arguments)
    return products.product_codes(library, *arguments)


def attention_codes(query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid) -> Tensor:
    """See `fused.attention_codes`."""
    library = native.library()
    operands = (query, key, value)
    if (
        (library is None or library.attention is None or query.shape[-1] // heads % 2)
        or any(each.dtype is not torch.bfloat16 or not each.numel() for each in operands)
    ):  # fmt: skip
        return plain.attention_codes(query, key, value, heads, grid)
    return attention_call.attention_codes(library, query, key, value, heads, grid)


def _library(*inputs: Tensor) -> Library | None:
    """The native kernels if they support `inputs`, or None.

    They support tensors on the CPU that are float32 or bfloat16 and not empty.
    """
    for x in inputs:
        if not x.is_cpu or x.dtype not in checks.FLOATS or not x.numel():
            return None
    return native.library()
