"""A layer's tiled weight and biases, with the C struct that the kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.runtime.ops.native import structures
from stepquant.runtime.ops.native.calls import floats


class Weight(NamedTuple):
    """A layer's tensors as the kernel reads them, and the C struct with their addresses."""

    tiles: Tensor
    """int8, or uint8 with two 4-bit weights per byte, see `native.tiles.lay_out`"""
    scale: Tensor
    """float32 `[C_out]`"""
    sums: Tensor
    """int32 `[C_out]`"""
    bias: Tensor | None
    """float32 `[C_out]`"""
    step_bias: Tensor | None
    """float32 `[T, C_out]`"""
    addresses: tuple[int, ...]
    structure: bytes

    def in_place(self) -> bool:
        """Whether the tensors are still at the addresses in the struct."""
        return self.addresses == addresses_of(*self[:5])


def weight_of(
    tiles: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None
) -> Weight:
    """The tensors with their C struct; biases become float32 and contiguous.

    Traced tensors, and tensors that are not on the CPU, get an empty struct.
    """
    if torch.compiler.is_compiling() or type(tiles) is not Tensor or not tiles.is_cpu:
        return Weight(tiles, scale, sums, bias, step_bias, (), b"")
    tensors = (tiles, scale, sums, floats(bias), floats(step_bias))
    addresses = addresses_of(*tensors)
    four_bits = tiles.dtype is torch.uint8
    structure = structures.WEIGHT.pack(addresses[0], four_bits, scale.shape[0], *addresses[1:])
    return Weight(*tensors, addresses, structure)


def addresses_of(*tensors: Tensor | None) -> tuple[int, ...]:
    """The address of each tensor's first element; 0 for None."""
    return tuple([0 if each is None else each.data_ptr() for each in tensors])
