"""Memory for the intermediate values of a recorded call, at fixed addresses for all replays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT = 64  # bytes, as in torch's CPU allocator


class Block:
    """A block of memory that holds one tensor at a time."""

    def __init__(self, count: int) -> None:
        room = np.empty(count + ALIGNMENT, dtype=np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        self.memory = room[start : start + count]
        self._tenant: StorageWeakRef | None = None

    def __len__(self) -> int:
        return len(self.memory)

    @property
    def address(self) -> int:
        """The address of the first byte."""
        return int(self.memory.ctypes.data)

    @property
    def free(self) -> bool:
        """Whether the latest tensor here and all its views have been deleted."""
        return self._tenant is None or bool(self._tenant.expired())

    def view(
        self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype, offset: int = 0
    ) -> Tensor:
        """A tensor over these bytes that does not keep the block occupied."""
        return torch.frombuffer(self.memory, dtype=dtype).as_strided(sizes, strides, offset)

    def let(self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `view`, but the block stays occupied until the tensor and its views are deleted."""
        tensor = self.view(sizes, strides, dtype)
        self._tenant = StorageWeakRef(tensor.untyped_storage())
        return tensor


class Memory:
    """The blocks that hold the intermediate values of one recorded call.

    During recording, later values reuse the block of a value that has died. A replay runs the
    kernels in the same order, so the reuse is valid there as well.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}

    @property
    def nbytes(self) -> int:
        """Size of all blocks, in bytes."""
        return sum(len(block) for block in self._blocks.values())

    def empty(self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor in the smallest free block that fits, or in a new one.

        Strides are counted in elements; none is negative. Blocks of more than twice the tensor's
        size stay free for larger tensors.
        """
        if not all(sizes):
            return torch.empty_strided(sizes, strides, dtype=dtype, device="cpu")
        last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        count = -(-(last + 1) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        fitting = [b for b in self._blocks.values() if count <= len(b) <= 2 * count and b.free]
        block = min(fitting, key=len, default=None)
        if block is None:
            block = Block(count)
            self._blocks[block.address] = block
        return block.let(sizes, strides, dtype)

    def spans(self) -> list[tuple[int, int]]:
        """`(address, bytes)` of each block."""
        return [(address, len(block)) for address, block in self._blocks.items()]

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies in one of the blocks, or is empty."""
        return storage_address(tensor) in self._blocks or not tensor.numel()

    def kept(self, tensor: Tensor) -> Tensor:
        """`tensor` as a replay holds it: a tensor in this memory does not occupy its block."""
        address = storage_address(tensor)
        block = None if address is None else self._blocks.get(address)
        if block is None or not tensor.numel():
            return tensor
        offset = int(tensor.storage_offset())
        return block.view(tensor.shape, tensor.stride(), tensor.dtype, offset)


def storage_address(tensor: Tensor) -> int | None:
    """The address of the tensor's storage; None for opaque layouts (oneDNN's weights)."""
    return None if tensor.layout != torch.strided else tensor.untyped_storage().data_ptr()
