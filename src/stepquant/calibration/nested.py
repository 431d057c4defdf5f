"""Arguments and outputs of blocks: tensors in tuples, lists and dictionaries, with rows or without.

A tensor has rows if its first dimension is that of the samples. A table of positions, say, has
none, and may be as long as there are samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def join(values: list[Any], counts: list[int]) -> Any:
    """The same value of calls with `counts` samples: joined where it has rows, else the first.

    The last call only tells by its number of samples what has rows, and is left out.
    """
    first = values[0]
    if isinstance(first, Tensor):
        rows = all(v.dim() > 0 and len(v) == n for v, n in zip(values, counts, strict=True))
        return torch.cat(values[:-1]) if rows else Shared(first)
    if isinstance(first, dict):
        return {key: join([value[key] for value in values], counts) for key in first}
    if type(first) in (tuple, list):
        return type(first)(join(list(entries), counts) for entries in zip(*values, strict=True))
    return first
