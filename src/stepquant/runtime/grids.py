"""Where an operation's codes go: the grid that they lie on, and the image that they form."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
    structure: bytes | None = None
    """Where all that lies, for the native kernels (`native.calls`); None: not written down yet.
    Of another row, or of tensors that moved, it is another one."""

    def in_force(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point of the row, `[1]` each."""
        if self.row is None:
            return self.scale[:1], self.zero_point[:1]
        return self.scale.index_select(0, self.row), self.zero_point.index_select(0, self.row)


class Output(NamedTuple):
    """An image of codes that is made of some of an operation's channels."""

    start: int
    """The first channel that it takes."""
    channels: int
    grid: Grid
    padding: tuple[int, int]
    """Rows above and below, columns left and right, that hold the zero point."""
