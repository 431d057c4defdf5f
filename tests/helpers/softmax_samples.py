"""Random values that look like attention's probabilities, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(sharpness: float, keys: int = 256) -> Tensor:
    """Probabilities of normal logits, `[4096]`."""
    return torch.softmax(sharpness * normal(4096).view(-1, keys), dim=-1).flatten()
