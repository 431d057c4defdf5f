"""A weight's change at low rank: LoRA, as EfficientDM (ICLR 2024) merges it before quantization."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """`up [C_out, r] @ down [r, K]`, added to a weight of `C_out` rows and `K` columns."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self) -> Tensor:
        """The change of the weight, `[C_out, K]`."""
        return self.up @ self.down


def zero_adapter(rows: int, columns: int, rank: int, generator: torch.Generator) -> LowRankAdapter:
    """One that adds nothing yet: `down` uniform within `1 / sqrt(K)`, `up` zero."""
    rank = min(rank, rows, columns)
    down = (2 * torch.rand(rank, columns, generator=generator) - 1) / columns**0.5
    return LowRankAdapter(down, torch.zeros(rows, rank))


def fitted_adapter(matrix: Tensor, rank: int) -> LowRankAdapter:
    """The one of `rank` that is closest to `matrix [C_out, K]`, its strength in both factors."""
    rank = min(rank, *matrix.shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRankAdapter((root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float())
