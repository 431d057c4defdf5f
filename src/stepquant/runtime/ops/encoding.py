"""From a packed layer's float input to codes, and what the codes do not hold of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepquant.numerics import max_code
from stepquant.quantizers.activation import spread_rows

if TYPE_CHECKING:
    from stepquant.runtime.layers.integer import PackedLayer


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """uint8 codes of `x` for `scale [1]` and `zero_point [1]`: `numerics.quantize` in one pass."""
    x = x.to(torch.float32)
    if torch.compiler.is_compiling():
        codes = torch.round(x * (1.0 / scale)) + zero_point
        return codes.clamp(0, max_code(bits)).to(torch.uint8)
    codes = x * (1.0 / scale)
    return codes.round_().add_(zero_point).clamp_(0, max_code(bits)).to(torch.uint8)


def input_error(layer: PackedLayer, x: Tensor) -> Tensor:
    """What the activation grids of `layer` do not hold of its input `x`, in its shape, float32."""
    context = layer.context
    rows = torch.zeros_like(context.rows[:1]) if layer.steps == 1 else context.rows
    rows = spread_rows(rows.to(x.device), x.shape[0])
    errors = []
    inputs = x.to(torch.float32).split(layer.splits, dim=layer.channel_dim)
    for part, prepared in zip(inputs, layer.prepared_parts(), strict=True):
        scale, zero_point = (
            table[prepared.index].index_select(0, rows).view(-1, *(1,) * (x.dim() - 1))
            for table in (layer.act_scale, layer.act_zero_point)
        )
        factors = prepared.grid.factors_for(part, layer.channel_dim)
        scaled = part if factors is None else part * factors
        codes = encode(scaled, scale, zero_point, layer.spec.activation_bits)
        error = scaled - (codes.to(torch.float32) - zero_point) * scale
        errors.append(error if factors is None else error / factors)
    return torch.cat(errors, dim=layer.channel_dim)
