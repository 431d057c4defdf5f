"""A denoiser of nobody's library: own attention, FiLM time conditioning, labels if any."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

SHAPE = (1, 12, 12)
WIDTH = 16


class FiLM(nn.Module):
    """Scale and shift from the time's embedding, by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project = nn.GroupNorm(4, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.project(time)[:, :, None, None].chunk(2, dim=1)
        return self.norm(x) * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.film, self.conv = FiLM(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.conv(nn.functional.silu(self.film(x, time)))


class SelfAttention(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(y).transpose(1, 2).unflatten(2, x.shape[2:])


class Denoiser(nn.Module):
    """Layers: 2 of the time, stem, 2 x 2 of blocks, 2 of attention, head."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(classes, WIDTH) if classes else None
        self.stem = nn.Conv2d(SHAPE[0], WIDTH, 3, padding=1)
        self.body = nn.ModuleList([Block(), SelfAttention(), Block()])
        self.head = nn.Conv2d(WIDTH, SHAPE[0], 3, padding=1)

    def forward(self, x: Tensor, timestep: Tensor, label: Tensor | None = None) -> Tensor:
        rates = torch.exp(-math.log(1000.0) * torch.arange(WIDTH // 2) / (WIDTH // 2))
        angles = timestep.float().reshape(-1, 1) * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        if self.label is not None:
            time = time + self.label(label)
        time = time.expand(len(x), -1)
        x = self.stem(x)
        for part in self.body:
            x = part(x, time)
        return self.head(x)


def denoiser(seed: int = 0, classes: int = 0) -> Denoiser:
    """One with random weights, always the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser(classes).eval()
