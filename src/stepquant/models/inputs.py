"""Random inputs that a denoiser takes, from its own config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MIDDLE = 500  # of the 1000 steps that models of discrete time are trained for
TOKENS = 8  # of a prompt

# sample [B, ...], timestep [] or [B], the other arguments by name
Inputs = tuple[Tensor, Tensor, dict[str, Any]]


def random_sample(model: nn.Module, batch: int) -> Tensor:
    """Noise of the model's own sample size, `[batch, C, H, W]`, the same at each call."""
    config = model.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return noise(batch, config.in_channels, height, width)


def noise(*shape: int) -> Tensor:
    """Standard normal values, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
