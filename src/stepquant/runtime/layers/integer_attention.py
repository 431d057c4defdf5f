"""Quantized attention products: step tables for the two products, no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepquant.numerics import check_bits, fake_quantize, quantize
from stepquant.numerics.attention_products import AttentionGrids, attention_of_differences
from stepquant.numerics.log2 import fake_quantize_log2
from stepquant.quantizers.activation import spread_rows
from stepquant.quantizers.step_grid import StepContext
from stepquant.runtime.layers.straight_through import wants_gradient, with_gradient_of

OPERANDS = ("query", "key", "value")


class PackedAttention(nn.Module):
    """Scaled dot-product attention with quantized queries, keys, values and probabilities.

    Buffers, for `T` rows (1 or the length of the step grid):

    - `act_scale` float32 `[3, T]` and `act_zero_point` uint8 `[3, T]`: grids of queries, keys and
      values;
    - `probability_scale` float32 `[T]`;
    - `probability_log2` uint8 `[T]`: 1 for steps whose probabilities use the log2 grid.

    The products are exact integer sums, computed in floating point (see
    `numerics.attention_products`), because torch's integer matmul takes two matrices, not a batch
    of small ones.
    """

    act_scale: Tensor
    act_zero_point: Tensor
    probability_scale: Tensor
    probability_log2: Tensor

    def __init__(self, bits: int, probability_bits: int, steps: int, context: StepContext) -> None:
        """Allocate step tables, for `load_state_dict` or `simulation.packing`.

        Args:
            bits: Bits of queries, keys and values.
            probability_bits: Bits of the probabilities.
            steps: Rows of the tables; 1 if all steps share one.
            context: Provides the row of the current step.

        Raises:
            StepQuantError: one of the bit widths is not supported.
        """
        super().__init__()
        self.bits = check_bits(bits, "attention bits")
        self.probability_bits = check_bits(probability_bits, "probability bits")
        self.steps, self.context = steps, context
        operands = len(OPERANDS)
        self.register_buffer("act_scale", torch.ones(operands, steps))
        self.register_buffer("act_zero_point", torch.zeros(operands, steps, dtype=torch.uint8))
        self.register_buffer("probability_scale", torch.ones(steps))
        self.register_buffer("probability_log2", torch.zeros(steps, dtype=torch.uint8))
        self._any_log2: bool | None = None  # cached, because reading it synchronizes the device

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of float `query [B, H, N, D]` to `key` and `value [B, H, M, D]`.

        `mask` broadcasts to `[B, H, N, M]` and is added to the scores. The result `[B, H, N, D]`
        has the dtype of `query`, and the gradient is the straight-through estimator's.
        """
        any_log2 = self._any_log2
        if any_log2 is None:
            any_log2 = self._any_log2 = bool(self.probability_log2.any())
        rows = self.context.rows.to(query.device)
        rows = torch.zeros_like(rows[:1]) if self.steps == 1 else spread_rows(rows, query.shape[0])
        scales = self.act_scale[:, rows].view(len(OPERANDS), -1, 1, 1, 1)
        zeros = self.act_zero_point[:, rows].view(len(OPERANDS), -1, 1, 1, 1).to(torch.float32)
        log2 = self.probability_log2[rows].view(-1, 1, 1, 1).bool() if any_log2 else None
        grids = AttentionGrids(
            query=scales[0],
            key=scales[1],
            value=scales[2],
            probability=self.probability_scale[rows].view(-1, 1, 1, 1),
            log2=log2,
            bits=self.bits,
            probability_bits=self.probability_bits,
        )
        operands = (query, key, value)
        with torch.no_grad():
            # `0 * operand` is NaN for operands that are not finite, which codes would hide.
            differences = [
                quantize(operand.to(torch.float32), scale, zero, self.bits) - zero + 0 * operand
                for operand, scale, zero in zip(operands, scales, zeros, strict=True)
            ]
            y = attention_of_differences(
                differences[0], differences[1], differences[2], grids, mask
            ).to(query.dtype)
        if not wants_gradient(*operands, mask):
            return y
        return with_gradient_of(y, differentiable_attention(operands, zeros, grids, mask))

    def _apply(self, fn: Any, recurse: bool = True) -> PackedAttention:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._any_log2 = None
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Bits and steps, as `print(model)` shows them."""
        return f"bits={self.bits}, probability_bits={self.probability_bits}, steps={self.steps}"


def differentiable_attention(
    operands: tuple[Tensor, Tensor, Tensor],
    zeros: Tensor,
    grids: AttentionGrids,
    mask: Tensor | None,
) -> Tensor:
    """Attention of fake-quantized operands, with the straight-through estimator's gradient.

    Args:
        operands: Float queries `[B, H, N, D]`, keys and values `[B, H, M, D]`.
        zeros: Zero points of queries, keys and values, `[3, B or 1, 1, 1, 1]`.
        grids: Scales and bits of the operands and the probabilities.
        mask: Broadcasts to `[B, H, N, M]` and is added to the scores, or None.

    Returns:
        Float `[B, H, N, D]`, in the dtype of the queries.
    """
    scales = (grids.query, grids.key, grids.value)
    query, key, value = (
        fake_quantize(operand.to(torch.float32), scale, zero, grids.bits)
        for operand, scale, zero in zip(operands, scales, zeros, strict=True)
    )
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    probabilities = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    scale, bits = grids.probability, grids.probability_bits
    levels = fake_quantize(probabilities, scale, torch.zeros_like(scale), bits)
    if grids.log2 is not None:
        levels = torch.where(grids.log2, fake_quantize_log2(probabilities, scale, bits), levels)
    return (levels @ value).to(operands[0].dtype)
