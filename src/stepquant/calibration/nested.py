"""Arguments and outputs of blocks: tensors in tuples, lists and dictionaries, with rows or without.

A tensor has rows if its first dimension is that of the samples. A table of positions, say, has
none, and may be as long as there are samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import StepQuantError
from stepquant.models.calling import inside


@dataclass(frozen=True)
class Shared:
    """A tensor that is there for all samples together."""

    tensor: Tensor


def pick(value: Any, index: Tensor | slice) -> Any:
    """`value` for the samples `index`."""
    if isinstance(value, Shared):
        return value.tensor
    if isinstance(value, Tensor):
        return value[index]
    return inside(value, lambda entry: pick(entry, index))


def join(values: list[Any], counts: list[int], owner: str) -> Any:
    """The same value of calls of `owner` with `counts` samples: joined where it has rows.

    Otherwise it is the same in all calls, and the first is taken. The last call only tells by its
    number of samples what has rows, and is left out.

    Raises StepQuantError, naming `owner`, for a tensor that has no rows and changes.
    """
    first = values[0]
    if isinstance(first, Tensor):
        if all(v.dim() > 0 and len(v) == n for v, n in zip(values, counts, strict=True)):
            return torch.cat(values[:-1])
        for value, count in zip(values, counts, strict=True):
            if value.shape != first.shape or not torch.allclose(value, first, equal_nan=True):
                raise StepQuantError(
                    f"{owner} takes a tensor {list(first.shape)} for {counts[0]} samples and "
                    f"another one {list(value.shape)} for {count}: expected a row for each "
                    "sample, or the same tensor at every call; choose other blocks"
                )
        return Shared(first)
    if isinstance(first, dict):
        return {key: join([value[key] for value in values], counts, owner) for key in first}
    if type(first) in (tuple, list):
        parts = zip(*values, strict=True)
        return type(first)(join(list(entries), counts, owner) for entries in parts)
    return first
