"""From floats to codes, and codes in the frame that a padded conv reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.numerics import max_code


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """uint8 codes of `x` for `scale [1]` and `zero_point [1]`: `numerics.quantize` in one pass."""
    x = x.to(torch.float32)
    if torch.compiler.is_compiling():
        codes = torch.round(x * (1.0 / scale)) + zero_point
        return codes.clamp(0, max_code(bits)).to(torch.uint8)
    codes = x * (1.0 / scale)
    return codes.round_().add_(zero_point).clamp_(0, max_code(bits)).to(torch.uint8)


def pad(codes: Tensor, zero_point: Tensor, padding: Sequence[int]) -> Tensor:
    """`codes [B, C, H, W]` between rows and columns of `zero_point [1]`, channels last.

    Part of the operator, not of what `torch.compile` sees: the code that it makes for copying uint8
    into a frame is slower than the conv.
    """
    if not any(padding):
        return codes.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = codes.shape
    top, left = padding
    shape = (batch, channels, height + 2 * top, width + 2 * left)
    # No copy of `zero_point`: torch.export takes that for a constant, which must not be written to.
    padded = torch.empty(
        shape, dtype=torch.uint8, device=codes.device, memory_format=torch.channels_last
    )
    padded.copy_(zero_point.to(torch.uint8).view(1, 1, 1, 1).expand(shape))
    padded[:, :, top : top + height, left : left + width] = codes
    return padded
