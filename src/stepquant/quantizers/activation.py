"""Activation quantizer: per tensor, one (scale, zero point) for each row of the step grid."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from stepquant.numerics import check_bits, fake_quantize, quantize
from stepquant.support.errors import StepQuantError


class ActivationQuantizer(nn.Module):
    """`scale [T]` and `zero_point [T]`, gathered by step row; `T = 1` serves every step.

    Source: DilateQuant (arXiv 2409.14307) section 4.2, equations 13 and 14.
    """

    def __init__(self, bits: int, steps: int) -> None:
        """`steps` is `T`: 1 for a static quantizer, the length of the step grid otherwise."""
        super().__init__()
        self.bits = check_bits(bits, "activation bits")
        self.scale = nn.Parameter(torch.ones(steps))
        self.zero_point = nn.Parameter(torch.zeros(steps))

    @property
    def steps(self) -> int:
        """Number of rows `T`."""
        return self.scale.numel()

    def resize(self, steps: int) -> None:
        """Give the tables `steps` rows, all with the values of row 0."""
        self.scale = nn.Parameter(self.scale.detach()[:1].repeat(steps))
        self.zero_point = nn.Parameter(self.zero_point.detach()[:1].repeat(steps))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Fake-quantize `x [B, ...]` with the rows `[1]` or `[B]` (int64).

        Where a layer sees each sample several times (`[B * H, ...]`), each row serves `H`
        neighbours. Rows that are not in the batch get a gradient of exactly zero.
        """
        rows = self.table_rows(rows, x.shape[0])
        shape = (-1,) + (1,) * (x.dim() - 1)
        scale = self.scale[rows].view(shape)
        zero_point = self.zero_point[rows].view(shape)
        return fake_quantize(x, scale, zero_point, self.bits)

    def differences(self, x: Tensor, rows: Tensor) -> Tensor:
        """`code - zero point` of `x [B, ...]` as float32; `rows` come from `table_rows`."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        zero_point = torch.round(self.zero_point[rows]).view(shape)
        return quantize(x, self.scale[rows].view(shape), zero_point, self.bits) - zero_point

    def table_rows(self, rows: Tensor, batch: int) -> Tensor:
        """Rows of these tables for a tensor of leading size `batch`: `[1]` or `[batch]`."""
        if self.steps == 1:
            return torch.zeros_like(rows[:1])
        return spread_rows(rows, batch)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"bits={self.bits}, steps={self.steps}"


class TakesErrors(Protocol):
    """What a layer may leave the error of its input with (`models.input_bypass`)."""

    def take(self, error: Tensor) -> None:
        """`error`: what the layer's grid loses of its input, float32, in the input's shape."""
        ...


def spread_rows(rows: Tensor, batch: int) -> Tensor:
    """`rows [R]` for a leading dimension of `batch`: `[1]` as it is, else each repeated."""
    if rows.numel() in (1, batch):
        return rows
    return rows.repeat_interleave(neighbours(rows, batch))


def neighbours(rows: Tensor, batch: int) -> int:
    """How many neighbours in a leading dimension of `batch` each of `rows [R]` serves."""
    if batch % rows.numel():
        raise StepQuantError(
            f"a quantized layer got a leading dimension of {batch} with {rows.numel()} timesteps: "
            "expected a multiple; pass one timestep, or one for each sample"
        )
    return batch // rows.numel()
