"""Memory for the values of a recorded call, which stays where it is from replay to replay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

ALIGNMENT = 64  # bytes, as torch's own memory on the CPU


class Block:
    """Bytes that one tensor after another lies in."""

    def __init__(self, count: int) -> None:
        room = np.empty(count + ALIGNMENT, dtype=np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        self.memory = room[start : start + count]
        self._tenant: StorageWeakRef | None = None

    def __len__(self) -> int:
        return len(self.memory)

    @property
    def address(self) -> int:
        """Where the bytes begin."""
        return int(self.memory.ctypes.data)

    @property
    def free(self) -> bool:
        """Whether the tensor that was put here last is gone, with all its views."""
        return self._tenant is None or bool(self._tenant.expired())

    def view(
        self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype, offset: int = 0
    ) -> Tensor:
        """A tensor over these bytes that does not count as their tenant."""
        return torch.frombuffer(self.memory, dtype=dtype).as_strided(sizes, strides, offset)

    def let(self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `view`, but the block is not free until the tensor and its views are gone."""
        tensor = self.view(sizes, strides, dtype)
        self._tenant = StorageWeakRef(tensor.untyped_storage())
        return tensor


class Memory:
    """Blocks of the values of one recorded call.

    While the call is recorded, a value that dies leaves its block to later ones. A replay runs the
    kernels in the same order, so that the same is true of it.
    """

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return sum(len(block) for block in self._blocks.values())

    def empty(self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of these sizes, strides (none negative) and dtype in the smallest free block.

        Blocks of more than twice its size are left to larger ones.
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
        """Where the blocks begin, and their bytes."""
        return [(address, len(block)) for address, block in self._blocks.items()]

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies here."""
        return storage_address(tensor) in self._blocks or not tensor.numel()

    def kept(self, tensor: Tensor) -> Tensor:
        """`tensor` as a replay may hold it: one that lies here does not keep its block."""
        address = storage_address(tensor)
        block = None if address is None else self._blocks.get(address)
        if block is None or not tensor.numel():
            return tensor
        offset = int(tensor.storage_offset())
        return block.view(tensor.shape, tensor.stride(), tensor.dtype, offset)


def storage_address(tensor: Tensor) -> int | None:
    """Where its memory begins; None for a layout that only operators know (oneDNN's weights)."""
    return None if tensor.layout != torch.strided else tensor.untyped_storage().data_ptr()
