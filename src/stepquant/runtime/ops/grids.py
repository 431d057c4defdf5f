"""Where an operation's codes go: the grid that they lie on, and the image that they form."""

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
    """int64 `[1]`: which of the rows is in force; None: row 0."""
    largest: int
    """The largest code, `2^bits - 1`."""
    factors: Tensor | None = None
    """float32 `[C]`: of the values of each channel before they are rounded; None: all are 1."""
    structure: bytes | None = None
    """Where all that lies, for the native kernels (`native.calls`); None: not written down yet.
    Of another row, or of tensors that moved, it is another one."""

    def in_force(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of the row, `[1]` each."""
        if self.row is None:
            return self.scale[:1], self.zero_point[:1]
        return self.scale.index_select(0, self.row), self.zero_point.index_select(0, self.row)

    def check_channels(self, channels: int) -> None:
        """Raise StepQuantError if the factors are those of another number of channels."""
        if self.factors is not None and self.factors.shape != (channels,):
            raise StepQuantError(
                f"a grid has factors of {tuple(self.factors.shape)} for {channels} channels: "
                "expected one for each"
            )

    def factors_for(self, x: Tensor, channel_dim: int) -> Tensor | None:
        """The factors in a shape that broadcasts over `x`."""
        if self.factors is None:
            return None
        shape = [1] * x.dim()
        shape[channel_dim] = -1
        return self.factors.view(shape)

    def scaled(self, x: Tensor, channel_dim: int) -> Tensor:
        """`x` times the factors: what is rounded."""
        factors = self.factors_for(x, channel_dim)
        return x if factors is None else x * factors


class Output(NamedTuple):
    """An image of codes that is made of some of an operation's channels."""

    start: int
    """The first channel that it takes."""
    channels: int
    grid: Grid
    padding: tuple[int, int]
    """Rows above and below, columns left and right, that hold the zero point."""
