"""Activation quantizer: one per-tensor scale and zero point for each row of the step tables."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from stepquant.numerics import check_bits, fake_quantize, quantize
from stepquant.support.errors import StepQuantError


class ActivationQuantizer(nn.Module):
    """Per-tensor activation quantizer with step tables.

    The tables `scale [T]` and `zero_point [T]` are float32 parameters; a forward pass gathers the
    rows of its steps. With `T = 1`, one row serves every step. Zero points may be any real number
    while they are trained; the quantizer rounds them to whole numbers.

    Source: DilateQuant (arXiv 2409.14307), section 4.2, equations 13 and 14.
    """

    def __init__(self, bits: int, steps: int) -> None:
        """Create the tables with scale 1 and zero point 0.

        `bits` is an int from 1 to 8. `steps` is `T`: 1 for a static quantizer, otherwise the length
        of the step grid.

        Raises:
            StepQuantError: `bits` is out of range.
        """
        super().__init__()
        self.bits = check_bits(bits, "activation bits")
        self.scale = nn.Parameter(torch.ones(steps))
        self.zero_point = nn.Parameter(torch.zeros(steps))

    @property
    def steps(self) -> int:
        """Number of rows `T`."""
        return self.scale.numel()

    def resize(self, steps: int) -> None:
        """Resize the tables to `steps` rows, each a copy of row 0."""
        self.scale = nn.Parameter(self.scale.detach()[:1].repeat(steps))
        self.zero_point = nn.Parameter(self.zero_point.detach()[:1].repeat(steps))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Fake-quantize `x [B, ...]` with the table rows `rows`, int64 `[1]` or `[B]`.

        A layer may see each sample `H` times in a row (`[B * H, ...]`). Each entry of `rows` then
        serves `H` neighbours. Table rows that the batch does not use get a gradient of exactly
        zero.

        Raises:
            StepQuantError: the leading dimension of `x` is not a multiple of the number of `rows`.
        """
        rows = self.table_rows(rows, x.shape[0])
        shape = (-1,) + (1,) * (x.dim() - 1)
        scale = self.scale[rows].view(shape)
        zero_point = self.zero_point[rows].view(shape)
        return fake_quantize(x, scale, zero_point, self.bits)

    def differences(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return `code - zero_point` of `x [B, ...]` as float32, for `rows` from `table_rows`."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        zero_point = torch.round(self.zero_point[rows]).view(shape)
        return quantize(x, self.scale[rows].view(shape), zero_point, self.bits) - zero_point

    def table_rows(self, rows: Tensor, batch: int) -> Tensor:
        """Return the table rows for a leading dimension of `batch`: int64 `[1]` or `[batch]`.

        Raises:
            StepQuantError: `batch` is not a multiple of the number of `rows`.
        """
        if self.steps == 1:
            return torch.zeros_like(rows[:1])
        return spread_rows(rows, batch)

    def extra_repr(self) -> str:
        """Describe the quantizer for `print(model)`."""
        return f"bits={self.bits}, steps={self.steps}"


class TakesErrors(Protocol):
    """An object that receives the quantization error of a layer's input (`models.input_bypass`)."""

    def take(self, error: Tensor) -> None:
        """Receive `error`: the input minus its quantized value, float32, in the input's shape."""
        ...


def spread_rows(rows: Tensor, batch: int) -> Tensor:
    """Expand `rows [R]` to a leading dimension of `batch`.

    A single row, or one row per entry, is returned unchanged. Otherwise each row is repeated for
    its neighbours, which gives `[batch]`.

    Raises:
        StepQuantError: `batch` is not a multiple of `R`.
    """
    if rows.numel() in (1, batch):
        return rows
    return rows.repeat_interleave(neighbours(rows, batch))


def neighbours(rows: Tensor, batch: int) -> int:
    """Return how many neighbours in a leading dimension of `batch` share each of `rows [R]`.

    Raises:
        StepQuantError: `batch` is not a multiple of `R`.
    """
    if batch % rows.numel():
        raise StepQuantError(
            f"a quantized layer got a batch dimension of {batch} with {rows.numel()} timesteps: "
            "expected a multiple of that number; pass one timestep, or one for each sample"
        )
    return batch // rows.numel()
