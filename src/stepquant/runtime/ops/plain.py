"""The fused passes in torch operations: the reference for the native kernels, and their fallback.

The functions take the arguments of their namesakes in `ops.fused`, already checked. They compute
in float32 and run on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.models.non_finite import report
from stepquant.runtime.ops.encoding import activated, pad
from stepquant.runtime.ops.encoding import encode as packed_encode
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import tiles
from stepquant.runtime.ops.native.tiled_weight import Weight
from stepquant.runtime.ops.result_shapes import shape_of


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
    x = torch.cat([part.to(torch.float32) for part in parts], dim=1)
    if added is not None:
        x = x + added.to(torch.float32)[:, :, None, None]
    report(x)
    y = functional.group_norm(x, groups, _float32(weight), _float32(bias), eps)
    y = activated(y, activation)
    return [
        encode(y[:, out.start : out.start + out.channels], "none", out.grid, out.padding)
        for out in outputs
    ]


def encode(
    x: Tensor, activation: str, output_grid: Grid, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """See `fused.encode`."""
    report(x)
    channel_dim = 1 if x.dim() == 4 else -1
    codes = _codes(activated(x.to(torch.float32), activation), output_grid, channel_dim)
    if x.dim() != 4:
        return codes
    return pad(codes, output_grid.in_force()[1], padding)


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
    channels = x.shape[-1]
    y = x.to(torch.float32)
    y = functional.layer_norm(y, (channels,), _float32(weight), _float32(bias), eps)
    middle = (x.shape[0], *(1,) * (x.dim() - 2), channels)
    if scale is not None:
        y = y * (1 + scale.to(torch.float32).view(middle))
    if shift is not None:
        y = y + shift.to(torch.float32).view(middle)
    report(y)
    return [_codes(y, grid) for grid in grids]


def gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> Tensor:
    """See `fused.gated_encode`."""
    values, gates = x.to(torch.float32).chunk(2, dim=-1)
    y = values * activated(gates, gate_activation)
    report(x)
    report(y)
    return _codes(y, output_grid)


def epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> tuple[Tensor, Tensor]:
    """See `fused.epilogue`."""
    scale, zero_point = grid.in_force()
    found = torch.zeros_like(sums) if bias is None else bias
    if step_bias is not None:
        found = found + step_bias_in_force(step_bias, grid)
    if add_share:
        found = found - scale * zero_point * sums
    return scale, found


def tiled_product(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    added: Tensor | None,
    dtype: torch.dtype,
    gate: Tensor | None,
) -> Tensor:
    """See `fused.tiled_product`; float64 sums are exact."""
    sizes, memory_format = shape_of(codes, spec)
    scale, zero_point = grid.in_force()
    offsets = codes.to(torch.float64) - zero_point
    dense = tiles.differences(weight.tiles, spec).to(torch.float64)
    middle: tuple[int, ...] = (-1,) if spec.kind == "linear" else (-1, 1, 1)
    if spec.kind == "linear":
        sums = functional.linear(offsets, dense)
    else:
        sums = functional.conv2d(offsets, dense, None, spec.stride, 0, spec.dilation)
    y = sums.to(torch.float32) * (scale * weight.scale).view(middle)
    if weight.bias is not None:
        y = y + weight.bias.view(middle)
    if weight.step_bias is not None:
        y = y + step_bias_in_force(weight.step_bias, grid).view(middle)
    if gate is not None:
        between = (1,) * (len(sizes) - 2)
        shape = (-1, spec.out_channels, *between)
        y = y * gate.view(shape if spec.kind == "conv2d" else (-1, *between, spec.out_channels))
    y = y.to(dtype) if added is None else (y + added).to(dtype)
    return y.contiguous(memory_format=memory_format)


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
    y = tiled_product(codes, grid, weight, spec, None, torch.float32, None)
    if not gated:
        return _codes(activated(y, activation), output_grid)
    values, gates = y.chunk(2, dim=-1)
    return _codes(values * activated(gates, activation), output_grid)


def attention_codes(query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid) -> Tensor:
    """See `fused.attention_codes`."""
    q, k, v = (
        each.to(torch.float32).unflatten(-1, (heads, -1)).transpose(1, 2)
        for each in (query, key, value)
    )
    y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    report(y)
    return _codes(y, grid)


def step_bias_in_force(step_bias: Tensor, grid: Grid) -> Tensor:
    """The biases `[C_out]` at the grid's current row, from `step_bias [T, C_out]`."""
    return step_bias[0] if grid.row is None else step_bias.index_select(0, grid.row)[0]


def _codes(y: Tensor, grid: Grid, channel_dim: int = -1) -> Tensor:
    y = grid.scaled(y, channel_dim)
    return packed_encode(y, *grid.in_force(), grid.largest.bit_length()).contiguous()


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)
