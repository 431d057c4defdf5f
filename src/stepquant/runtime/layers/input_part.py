"""One input part of an integer layer: its weight on a kernel, and its activation grid.

Most layers have one part. The first conv of a decoder stage has two, the backbone's channels and
the skip's, each with grids of its own.
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

    `grid`: the activation grid, at row 0. Where a method takes `row`, that is the row of the step
    tables, int64 `[1]`, or None where all steps share one.
    """

    def __init__(self, weight: PackedWeight, grid: Grid, start: int) -> None:
        """`weight` is prepared."""
        self.weight, self.grid, self.start = weight, grid, start
        self.index = weight.index
        self.spec: LayerSpec = weight.spec
        self.no_codes = why_no_codes(weight)
        """Why the part cannot be handed codes, or None."""
        # The grid of the latest call in any thread, with its tensors' addresses. Calls of other
        # threads replace it, and none uses one with the row of another call.
        self._in_force: tuple[Grid, tuple[int, ...]] | None = None

    def grid_at(self, row: Tensor | None) -> Grid:
        """The activation grid at `row`, the same object while row and memory stay the same.

        It has the C structure that native kernels read.
        """
        if torch.compiler.is_compiling():  # traced tensors have no addresses
            return self.grid._replace(row=row)
        latest = self._in_force  # once: another thread may replace it
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
        """The codes of `activation(x)` for the kernel; `x` is the input of this part."""
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
        """The part's result for floats `x`, plus `bias` and `accumulate`; all samples at `row`.

        `state`: of the weight (`PackedWeight.state`).
        """
        scale = self.grid.scale.index_select(0, row)
        zero_point = self.grid.zero_point.index_select(0, row)
        bits = self.spec.activation_bits
        codes = encode(self.grid.scaled(x, channel_dim), scale, zero_point, bits)
        zero_point = zero_point.to(torch.int32)
        kernel = self.weight.kernel
        return kernel.run(state, codes, scale, zero_point, bias, accumulate, self.spec)

    def input_error(self, x: Tensor, rows: Tensor, channel_dim: int) -> Tensor:
        """`x` minus its value on the grid, float32; `x` is float32, `rows [B]`."""
        scale, zero_point = self._at_rows(x, rows)
        factors = self.grid.factors_for(x, channel_dim)
        scaled = x if factors is None else x * factors
        codes = encode(scaled, scale, zero_point, self.spec.activation_bits)
        error = scaled - (codes.to(torch.float32) - zero_point) * scale
        return error if factors is None else error / factors

    def slope(self, x: Tensor, rows: Tensor, channel_dim: int) -> Tensor:
        """The gradient of the values that the weight multiplies, by `x`; arguments as above.

        That is the factor of each in-channel, or 0 where the grid clips `x`.
        """
        scale, zero_point = self._at_rows(x, rows)
        free = torch.round(self.grid.scaled(x, channel_dim) * (1.0 / scale)) + zero_point
        inside = (free >= 0) & (free <= max_code(self.spec.activation_bits))
        return self.grid.scaled(inside.to(torch.float32), channel_dim)

    def _at_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of `rows`, in a shape that broadcasts over `x`."""
        tables = (self.grid.scale, self.grid.zero_point)
        scale, zero_point = (table.index_select(0, rows) for table in tables)
        shape = (-1, *(1,) * (x.dim() - 1))
        return scale.view(shape), zero_point.view(shape)

    def read(self) -> list[Tensor]:
        """The tensors that calls read, apart from the step tables, which are buffers."""
        return [*self.weight.read(), *([] if self.grid.factors is None else [self.grid.factors])]


def why_no_codes(weight: PackedWeight) -> Refusal | None:
    """Why the kernel of a prepared weight does not do with codes what it does with floats."""
    kernel = weight.kernel
    if not isinstance(kernel, TakesCodes):
        return Refusal(RefusalCode.OTHER_KERNEL, f"the kernel {kernel.name}")
    return kernel.why_no_codes(weight.spec)
