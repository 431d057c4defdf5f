"""Inputs that a denoiser takes, from its own config."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def random_sample(model: nn.Module, batch: int) -> Tensor:
    """Noise of the model's own sample size, `[batch, C, H, W]`, the same at each call."""
    config = model.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, config.in_channels, height, width, generator=generator)
