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
    """Quantizer of attention probabilities with step tables.

    - `scale [T]`: float32, trainable.
    - `log2 [T]`: bool. False selects a uniform grid from zero with step `scale`. True selects the
      log2 grid from `scale` downwards.
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
        """Resize the tables to `steps` rows, each a copy of row 0."""
        self.scale = nn.Parameter(self.scale.detach()[:1].repeat(steps))
        self.log2 = self.log2[:1].repeat(steps)

    def forward(self, probabilities: Tensor, rows: Tensor) -> Tensor:
        """Fake-quantize `probabilities [B, ...]` with table rows `rows`, int64 `[1]` or `[B]`."""
        shape = (-1,) + (1,) * (probabilities.dim() - 1)
        scale, log2 = self.scale[rows].view(shape), self.log2[rows].view(shape)
        uniform = fake_quantize(probabilities, scale, torch.zeros_like(scale), self.bits)
        if not bool(log2.any()):
            return uniform
        return torch.where(log2, fake_quantize_log2(probabilities, scale, self.bits), uniform)

    def extra_repr(self) -> str:
        """Describe the quantizer for `print(model)`."""
        return f"bits={self.bits}, steps={self.steps}"


class QuantAttention(nn.Module):
    """Scaled dot-product attention with quantized queries, keys, values and probabilities.

    Grids are per tensor and per step, as for layer inputs. With `quantizing` False, attention runs
    in float.
    """

    def __init__(self, bits: int, probability_bits: int, context: StepContext) -> None:
        """Create step tables of one row; `resize` gives them more.

        `bits` applies to queries, keys and values, `probability_bits` to probabilities.

        Raises:
            StepQuantError: a number of bits is not an int from 1 to 8.
        """
        super().__init__()
        self.bits, self.context, self.quantizing = bits, context, False
        self.activation_quantizers = nn.ModuleList(ActivationQuantizer(bits, 1) for _ in range(3))
        self.probabilities = ProbabilityQuantizer(probability_bits, 1)

    def resize(self, steps: int) -> None:
        """Resize all tables to `steps` rows, each a copy of row 0."""
        for quantizer in self.activation_quantizers:
            assert isinstance(quantizer, ActivationQuantizer)
            quantizer.resize(steps)
        self.probabilities.resize(steps)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the attention output `[B, H, N, D]`.

        `query` is `[B, H, N, D]`; `key` and `value` are `[B, H, M, D]`. `mask` broadcasts to
        `[B, H, N, M]` and is added to the scores. Without gradients, quantizing attention computes
        as the integer runtime does.

        Raises:
            StepQuantError: `B` is not a multiple of the number of timesteps.
        """
        if not self.quantizing:
            return functional.scaled_dot_product_attention(query, key, value, mask)
        rows = self._rows(query.shape[0])
        if not torch.is_grad_enabled():
            return self._compute_integers((query, key, value), mask, rows)
        probabilities = self.float_probabilities(query, key, mask)
        return self.probabilities(probabilities, rows) @ self.activation_quantizers[2](value, rows)

    def float_probabilities(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
        """Return the probabilities `[B, H, N, M]` before they are quantized.

        While `quantizing`, queries and keys are fake-quantized first.
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
        """Compute `forward` as the runtime does."""
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
    """Return float probabilities `[B, H, N, M]` of `query [B, H, N, D]` and `key [B, H, M, D]`.

    `mask`, if any, broadcasts to `[B, H, N, M]` and is added to the scores.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return torch.softmax(scores if mask is None else scores + mask, dim=-1)
