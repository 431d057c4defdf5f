"""Nested arguments and outputs of blocks, split into per-sample and shared tensors.

Tensors may be inside tuples, lists and dictionaries. A tensor has rows if its first dimension
counts the samples. A shared tensor, such as a table of positions, has no rows, even if its length
happens to equal the number of samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from stepquant.calibration.spill import Rows, Spill
from stepquant.models.calling import tensors_in
from stepquant.support.errors import StepQuantError


@dataclass(frozen=True)
class Shared:
    """A tensor that all samples share."""

    tensor: Tensor


def pick(value: Any, index: Tensor | slice) -> Any:
    """Return `value` for the samples at `index`: rows are selected, shared tensors unwrapped."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Shared):
            return leaf.tensor
        return leaf[index] if isinstance(leaf, Tensor) else leaf

    return tree_map(of_leaf, value)


class Joined:
    """Joins one nested value over several calls of `owner`.

    Tensors with rows are concatenated. Tensors without rows must be equal in all calls; the first
    is kept. The second call must have another number of samples than the first. It only shows
    which tensors have rows, and its values are dropped.

    `owner` names the module in errors. `total` is the number of samples in all calls but the
    second. `spill` allocates the joined tensors.
    """

    def __init__(self, owner: str, total: int, spill: Spill) -> None:
        self._owner, self._total, self._spill = owner, total, spill
        self._calls = 0
        self._first: Any = None
        self._count = 0  # samples of the first call
        self._rows: list[Rows | None] = []  # one entry for each tensor in the value, in order

    def add(self, value: Any, count: int) -> None:
        """Add the value of the next call, which had `count` samples.

        Rows are copied. Only the value of the first call is kept itself.

        Raises:
            StepQuantError: a tensor has no rows, but differs from that of the first call.
        """
        tensors = tensors_in(value)
        if self._calls == 0:
            self._first, self._count = value, count
        else:
            firsts = tensors_in(self._first)
            if self._calls == 1:
                pairs = zip(firsts, tensors, strict=True)
                self._rows = [
                    Rows(self._total, self._spill)
                    if _has_rows(first, self._count) and _has_rows(second, count)
                    else None
                    for first, second in pairs
                ]
                for rows, first in zip(self._rows, firsts, strict=True):
                    if rows is not None:
                        rows.add(first)
            for rows, first, tensor in zip(self._rows, firsts, tensors, strict=True):
                if rows is None:
                    self._check_shared(first, tensor, count)
                elif not _has_rows(tensor, count):
                    raise self._changing(first, tensor, count)
                elif self._calls > 1:
                    rows.add(tensor)
        self._calls += 1

    def joined(self) -> Any:
        """Return the value for all samples: tensors with rows `[total, ...]`, others `Shared`."""
        found = iter(zip(self._rows, tensors_in(self._first), strict=True))

        def build(_: Tensor) -> Any:
            rows, first = next(found)
            return Shared(first) if rows is None else rows.joined()

        return tree_map_only(Tensor, build, self._first)

    def _check_shared(self, first: Tensor, tensor: Tensor, count: int) -> None:
        if tensor.shape != first.shape or not torch.allclose(tensor, first, equal_nan=True):
            raise self._changing(first, tensor, count)

    def _changing(self, first: Tensor, tensor: Tensor, count: int) -> StepQuantError:
        return StepQuantError(
            f"{self._owner} takes a tensor {list(first.shape)} for {self._count} samples and "
            f"another one {list(tensor.shape)} for {count}: expected a row for each sample, or the "
            "same tensor at every call; choose other blocks"
        )


def _has_rows(tensor: Tensor, count: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == count
