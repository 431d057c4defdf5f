"""Fake implementations of the fused passes: empty results from which `torch.compile` plans.

The functions take the arguments of their namesakes in `ops.plain`, already checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
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
    """One uint8 image for each of `outputs`."""
    return [_image(parts[0], out.channels, out.padding) for out in outputs]


def encode(x: Tensor, activation: str, output_grid: Grid, padding: tuple[int, int]) -> Tensor:
    """A padded uint8 image, or uint8 of the shape of `x`."""
    return _image(x, x.shape[1], padding) if x.dim() == 4 else _codes(x)


def layer_norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    grids: Sequence[Grid],
) -> list[Tensor]:
    """uint8 of the shape of `x` for each of `grids`."""
    return [_codes(x) for _ in grids]


def gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> Tensor:
    """uint8 with half the channels of `x`."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)


def epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> tuple[Tensor, Tensor]:
    """A scale `[1]` and a float32 bias `[C_out]`."""
    return grid.scale.new_empty(1), sums.new_empty(sums.shape, dtype=torch.float32)


def tiled_product(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    added: Tensor | None,
    dtype: torch.dtype,
    gate: Tensor | None,
) -> Tensor:
    """The layer's result, of `dtype`."""
    return empty_result(codes, spec, dtype)


def tiled_product_codes(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    activation: str,
    gated: bool,
    output_grid: Grid,
) -> Tensor:
    """The layer's result as uint8 codes, with half the channels if `gated`."""
    channels = spec.out_channels // 2 if gated else spec.out_channels
    return codes.new_empty((*codes.shape[:-1], channels))


def attention_codes(query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid) -> Tensor:
    """uint8 of the shape of `query`."""
    return _codes(query)


def _codes(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.uint8)


def _image(x: Tensor, channels: int, padding: tuple[int, int]) -> Tensor:
    batch, _, height, width = x.shape
    sizes = (batch, channels, height + 2 * padding[0], width + 2 * padding[1])
    return torch.empty(sizes, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)
