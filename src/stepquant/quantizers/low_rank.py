"""Low-rank change of a weight (LoRA), merged before quantization.

Source: EfficientDM (ICLR 2024, arXiv 2310.03270), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankAdapter(nn.Module):
    """Trainable product `up [C_out, r] @ down [r, K]`.

    It is added to a weight of `C_out` rows and `K` columns.
    """

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)

    def forward(self) -> Tensor:
        """Return the change of the weight, `[C_out, K]`."""
        return self.up @ self.down


def zero_adapter(rows: int, columns: int, rank: int, generator: torch.Generator) -> LowRankAdapter:
    """Return an adapter of rank at most `rank` that adds nothing yet.

    `up` is zero, and `down` is uniform within `1 / sqrt(K)` of zero, with `K = columns`. Both are
    float32.
    """
    rank = min(rank, rows, columns)
    down = (2 * torch.rand(rank, columns, generator=generator) - 1) / columns**0.5
    return LowRankAdapter(down, torch.zeros(rows, rank))


def fitted_adapter(matrix: Tensor, rank: int) -> LowRankAdapter:
    """Return the adapter of rank at most `rank` that is closest to `matrix [C_out, K]`.

    It is the truncated SVD, computed in float64. Each factor takes the square roots of the singular
    values. The factors are float32.
    """
    rank = min(rank, *matrix.shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return LowRankAdapter((root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float())
