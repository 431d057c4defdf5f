"""What a packed layer's activation grids do not hold of its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stepquant.quantizers.activation import spread_rows
from stepquant.runtime.ops.encoding import encode

if TYPE_CHECKING:
    from stepquant.runtime.layers.integer import IntegerLayer


def input_error(layer: IntegerLayer, x: Tensor) -> Tensor:
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
