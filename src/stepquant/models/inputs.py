"""Random inputs for a denoiser, in the sizes of its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIDDLE = 500  # of the 1000 timesteps that discrete-time models are trained on
TOKENS = 8  # in a prompt

# (sample [B, ...], timestep [] or [B], other arguments by name)
Inputs = tuple[Tensor, Tensor, dict[str, Any]]


def random_sample(model: Any, batch: int) -> Tensor:
    """Return noise in the model's sample size, float32 `[batch, C, H, W]`.

    Every call returns the same values.
    """
    config = model.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return noise(batch, config.in_channels, height, width)


def noise(*shape: int) -> Tensor:
    """Return standard normal values of this shape, float32, the same at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
