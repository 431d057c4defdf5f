"""One input part of an integer layer: its weight on a kernel, and its activation grid.

Most layers have one part. The first conv of a decoder stage has two, one for the backbone's
channels and one for those of the skip connection; each part has its own grids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics import max_code
from stepquant.runtime.kernels import State, TakesCodes
from stepquant.runtime.layers.packed_weight import PackedWeight
from stepquant.runtime.ops import fused, native
from stepquant.runtime.ops.encoding import encode
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native.calls import grid_addresses, grid_structure
from stepquant.support.refusal import Refusal, RefusalCode


class InputPart:
    """In-channels `start` to `start + spec.in_channels` of a layer.

    `grid` is the activation grid at row 0. The argument `row` of methods is the row of the step
    table, int64 `[1]`; None if all steps share one row.
    """

    def __init__(self, weight: PackedWeight, grid: Grid, start: int) -> None:
        """Combine a prepared `weight` with the activation grid of its in-channels."""
        self.weight, self.grid, self.start = weight, grid, start
        self.index = weight.index
        self.spec: LayerSpec = weight.spec
        self.no_codes = why_no_codes(weight)
        """Why the part cannot take codes, or None."""
        # The grid of the latest call in any thread, with its tensors' addresses. Other threads may
        # replace it; a call uses it only if the row is its own.
        self._in_force: tuple[Grid, tuple[int, ...]] | None = None

    def grid_at(self, row: Tensor | None) -> Grid:
        """The activation grid at `row`, with the C struct that native kernels read.

        Returns the same object while the row and the tensors' addresses stay the same.
        """
        if torch.compiler.is_compiling():  # traced tensors have no addresses
            return self.grid._replace(row=row)
        latest = self._in_force  # read once, because another thread may replace it
        if latest is not None:
            known, addresses = latest
            if known.row is row and addresses == grid_addresses(known):
                return known
        grid = self.grid._replace(row=row)
        if native.available() and (row is None or row.is_cpu):
            grid = grid._replace(structure=grid_structure(grid))
            self._in_force = grid, grid_addresses(grid)
        return grid

    def encode(self, x: Tensor, activation: str, row: Tensor | None) -> Tensor:
        """uint8 codes of `activation(x)`, padded for the kernel; `x` is the input of this part."""
        return fused.encode(x, activation, self.grid_at(row), self.spec.padding)

    def run_floats(
        self,
        state: State,
        x: Tensor,
        row: Tensor,
        bias: Tensor | None,
        accumulate: Tensor | None,
        channel_dim: int,
    ) -> Tensor:
        """The part's float32 result for floats `x`, plus `bias` and `accumulate`.

        Args:
            state: The weight's state (`PackedWeight.state`).
            x: Float `[B, C, H, W]` or `[..., C]`.
            row: int64 `[1]`, the step row of all samples.
            bias: float32 `[C_out]`, or None.
            accumulate: float32 sum of the input parts before this one, or None.
            channel_dim: The channel dimension of `x`.
        """
        scale = self.grid.scale.index_select(0, row)
        zero_point = self.grid.zero_point.index_select(0, row)
        bits = self.spec.activation_bits
        codes = encode(self.grid.scaled(x, channel_dim), scale, zero_point, bits)
        zero_point = zero_point.to(torch.int32)
        kernel = self.weight.kernel
        return kernel.run(state, codes, scale, zero_point, bias, accumulate, self.spec)

    def input_error(self, x: Tensor, rows: Tensor, channel_dim: int) -> Tensor:
        """The quantization error of `x`: `x` minus its value on the grid, float32.

        `x`: float32. `rows`: int64 `[B]`, the step row of each sample.
        """
        scale, zero_point = self._at_rows(x, rows)
        factors = self.grid.factors_for(x, channel_dim)
        scaled = x if factors is None else x * factors
        codes = encode(scaled, scale, zero_point, self.spec.activation_bits)
        error = scaled - (codes.to(torch.float32) - zero_point) * scale
        return error if factors is None else error / factors

    def slope(self, x: Tensor, rows: Tensor, channel_dim: int) -> Tensor:
        """The gradient of the quantized input with respect to `x`, float32; see `input_error`.

        It is the factor of each in-channel (1 without factors), and 0 where the grid clips `x`.
        """
        scale, zero_point = self._at_rows(x, rows)
        free = torch.round(self.grid.scaled(x, channel_dim) * (1.0 / scale)) + zero_point
        inside = (free >= 0) & (free <= max_code(self.spec.activation_bits))
        return self.grid.scaled(inside.to(torch.float32), channel_dim)

    def _at_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points at `rows`, in a shape that broadcasts over `x`."""
        tables = (self.grid.scale, self.grid.zero_point)
        scale, zero_point = (table.index_select(0, rows) for table in tables)
        shape = (-1, *(1,) * (x.dim() - 1))
        return scale.view(shape), zero_point.view(shape)

    def read(self) -> list[Tensor]:
        """The tensors that calls read, except the step tables, which are the layer's buffers."""
        return [*self.weight.read(), *([] if self.grid.factors is None else [self.grid.factors])]


def why_no_codes(weight: PackedWeight) -> Refusal | None:
    """Why the kernel of a prepared weight cannot take codes, or None."""
    kernel = weight.kernel
    if not isinstance(kernel, TakesCodes):
        return Refusal(RefusalCode.OTHER_KERNEL, f"the kernel {kernel.name}")
    return kernel.why_no_codes(weight.spec)
