"""Whether tensors hold numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether `tensor`, of any shape and floating-point dtype, holds neither NaN nor infinity."""
    # torch has no such check for floats of eight bits.
    numbers = tensor.to(torch.float32) if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(numbers).all())
