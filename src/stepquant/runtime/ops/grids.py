"""Activation grids, and the code images that fused passes write."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from stepquant.support.errors import StepQuantError


class Grid(NamedTuple):
    """A layer's activation grid at one of `T` steps."""

    scale: Tensor
    """float32 `[T]`"""
    zero_point: Tensor
    """uint8 `[T]`"""
    row: Tensor | None
    """int64 `[1]`: the current row; None: row 0."""
    largest: int
    """The largest code, `2^bits - 1`."""
    factors: Tensor | None = None
    """float32 `[C]`: factors that multiply each channel before rounding; None: all are 1."""
    structure: bytes | None = None
    """Cached C struct for this grid (`native.calls`), or None; valid only for this row and while
    its tensors stay where they are."""

    def in_force(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of the current row, `[1]` each."""
        if self.row is None:
            return self.scale[:1], self.zero_point[:1]
        return self.scale.index_select(0, self.row), self.zero_point.index_select(0, self.row)

    def check_channels(self, channels: int) -> None:
        """Raise StepQuantError if the grid has factors for another number of channels."""
        if self.factors is not None and self.factors.shape != (channels,):
            raise StepQuantError(
                f"a grid has factors of {tuple(self.factors.shape)} for {channels} channels: "
                "expected one factor per channel"
            )

    def factors_for(self, x: Tensor, channel_dim: int) -> Tensor | None:
        """The factors in a shape that broadcasts over `x`, or None."""
        if self.factors is None:
            return None
        shape = [1] * x.dim()
        shape[channel_dim] = -1
        return self.factors.view(shape)

    def scaled(self, x: Tensor, channel_dim: int) -> Tensor:
        """`x` times the factors: the values to round."""
        factors = self.factors_for(x, channel_dim)
        return x if factors is None else x * factors


class Output(NamedTuple):
    """An image of codes, made from a range of an operation's channels."""

    start: int
    """The first channel of the range."""
    channels: int
    grid: Grid
    padding: tuple[int, int]
    """Rows above and below, columns left and right, filled with the zero point."""
