"""Memory-mapped tensors for calibration sets that are larger than memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from stepquant.support.errors import StepQuantError


class Spill:
    """Allocates tensors, large ones in memory-mapped files.

    Tensors of at least `at_least` bytes are in files in `folder`, others in memory. Without a
    folder all are in memory. The files are temporary: the disk space is free again once the tensor
    is gone, however the process ends.
    """

    def __init__(self, folder: Path | None = None, at_least: int = 0) -> None:
        self.folder, self.at_least = folder, at_least
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor of `shape` and `dtype` on the CPU.

        Raises:
            StepQuantError: the file cannot be written, for example because the disk is full.
        """
        size = math.prod(shape) * dtype.itemsize
        if self.folder is None or size < max(1, self.at_least):
            return torch.empty(tuple(shape), dtype=dtype)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _reserve(file, size)
                mapped = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise StepQuantError(
                f"'{self.folder}' has no room for {size / 2**30:.1f} GiB of activations "
                f"({error.strerror}): expected free space on the disk of the output folder, "
                "because they do not fit in memory; free some and continue with --resume"
            ) from error
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(tuple(shape))

    def release(self) -> None:
        """Drop the mapped pages from this process's memory; the contents stay in the files."""
        if hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows, which pages out by itself
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve `size` bytes on disk: a write to a mapping on a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(min(size, 1 << 20))  # macOS and Windows
    for start in range(0, size, len(zeros)):
        file.write(zeros[: size - start])
    file.flush()


class Rows:
    """Joins tensors `[n, ...]`, added one after another, to one tensor `[total, ...]`.

    `spill` allocates the joined tensor, in the dtype of the first part.
    """

    def __init__(self, total: int, spill: Spill) -> None:
        self._total, self._spill = total, spill
        self._joined: Tensor | None = None
        self._count = 0

    def add(self, part: Tensor) -> None:
        """Append a copy of `part [n, ...]`."""
        if self._joined is None:
            self._joined = self._spill.empty((self._total, *part.shape[1:]), part.dtype)
        self._joined[self._count : self._count + len(part)] = part
        self._count += len(part)
        self._spill.release()

    def joined(self) -> Tensor:
        """Return the joined tensor `[total, ...]`; all rows must have been added."""
        assert self._joined is not None and self._count == self._total
        return self._joined
