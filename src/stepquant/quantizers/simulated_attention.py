"""Trainable simulation of attention's two products with quantized operands."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepquant.numerics import check_bits, fake_quantize
from stepquant.numerics.attention_products import AttentionGrids, attention_of_differences
from stepquant.numerics.log2 import fake_quantize_log2
from stepquant.quantizers.activation import ActivationQuantizer, spread_rows
from stepquant.quantizers.step_grid import StepContext


class ProbabilityQuantizer(nn.Module):
    """`scale [T]` of probabilities, and `log2 [T]` bool: which grid each step has.

    A uniform grid from zero with step `scale`, or the log2 grid below `scale`.
    """

    def __init__(self, bits: int, steps: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, "probability bits")
        self.scale = nn.Parameter(torch.ones(steps))
        self.log2: Tensor
        self.register_buffer("log2", torch.zeros(steps, dtype=torch.bool))

    @property
    def steps(self) -> int:
        """Number of rows `T`."""
        return self.scale.numel()

    def resize(self, steps: int) -> None:
        """Give the tables `steps` rows, all with the values of row 0."""
        self.scale = nn.Parameter(self.scale.detach()[:1].repeat(steps))
        self.log2 = self.log2[:1].repeat(steps)

    def forward(self, probabilities: Tensor, rows: Tensor) -> Tensor:
        """Fake-quantize `probabilities [B, ...]` with the rows `[1]` or `[B]` (int64)."""
        shape = (-1,) + (1,) * (probabilities.dim() - 1)
        scale, log2 = self.scale[rows].view(shape), self.log2[rows].view(shape)
        uniform = fake_quantize(probabilities, scale, torch.zeros_like(scale), self.bits)
        if not bool(log2.any()):
            return uniform
        return torch.where(log2, fake_quantize_log2(probabilities, scale, self.bits), uniform)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"bits={self.bits}, steps={self.steps}"


class QuantAttention(nn.Module):
    """Scaled dot-product attention with queries, keys, values and probabilities on their grids.

    Per tensor and step, as inputs of layers are. `quantizing`: False computes in float.
    """

    def __init__(self, bits: int, probability_bits: int, context: StepContext) -> None:
        """`bits` of queries, keys and values; tables have one row until they are resized."""
        super().__init__()
        self.bits, self.context, self.quantizing = bits, context, False
        self.activation_quantizers = nn.ModuleList(ActivationQuantizer(bits, 1) for _ in range(3))
        self.probabilities = ProbabilityQuantizer(probability_bits, 1)

    def resize(self, steps: int) -> None:
        """Give all tables `steps` rows."""
        for quantizer in self.activation_quantizers:
            assert isinstance(quantizer, ActivationQuantizer)
            quantizer.resize(steps)
        self.probabilities.resize(steps)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attention of `query [B, H, N, D]` to `key` and `value [B, H, M, D]`: `[B, H, N, D]`.

        `mask` broadcasts to `[B, H, N, M]` and is added to the scores.
        """
        if not self.quantizing:
            return functional.scaled_dot_product_attention(query, key, value, mask)
        rows = self._rows(query.shape[0])
        if not torch.is_grad_enabled():
            return self._compute_integers((query, key, value), mask, rows)
        probabilities = self.float_probabilities(query, key, mask)
        return self.probabilities(probabilities, rows) @ self.activation_quantizers[2](value, rows)

    def float_probabilities(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Probabilities `[B, H, N, M]` before they are put on their grid.

        Those of queries and keys on their grids if the products are `quantizing`.
        """
        if self.quantizing:
            rows = self._rows(query.shape[0])
            query = self.activation_quantizers[0](query, rows)
            key = self.activation_quantizers[1](key, rows)
        return scaled_softmax(query, key, mask)

    def _rows(self, batch: int) -> Tensor:
        if self.probabilities.steps == 1:
            return torch.zeros_like(self.context.rows[:1])
        return spread_rows(self.context.rows, batch)

    def _compute_integers(
        self, operands: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, rows: Tensor
    ) -> Tensor:
        """`forward` as the runtime computes it."""
        differences: list[Tensor] = []
        scales: list[Tensor] = []
        for quantizer, operand in zip(self.activation_quantizers, operands, strict=True):
            assert isinstance(quantizer, ActivationQuantizer)
            differences.append(quantizer.differences(operand, rows))
            scales.append(quantizer.scale[rows].view(-1, 1, 1, 1))
        log2 = self.probabilities.log2[rows]
        grids = AttentionGrids(
            query=scales[0],
            key=scales[1],
            value=scales[2],
            probability=self.probabilities.scale[rows].view(-1, 1, 1, 1),
            log2=log2.view(-1, 1, 1, 1) if bool(log2.any()) else None,
            bits=self.bits,
            probability_bits=self.probabilities.bits,
        )
        return attention_of_differences(differences[0], differences[1], differences[2], grids, mask)


def scaled_softmax(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Float probabilities `[B, H, N, M]` of `query [B, H, N, D]` and `key [B, H, M, D]`."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)
