"""Quantization of floats to codes, and padding of codes for convs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.numerics import max_code


def encode(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """uint8 codes of float `x`, in its shape; the values of `numerics.quantize`.

    `scale`: float32 `[1]`. `zero_point`: `[1]`. `bits`: of the codes.
    """
    x = x.to(torch.float32)
    if torch.compiler.is_compiling():
        codes = torch.round(x * (1.0 / scale)) + zero_point
        return codes.clamp(0, max_code(bits)).to(torch.uint8)
    codes = x * (1.0 / scale)
    return codes.round_().add_(zero_point).clamp_(0, max_code(bits)).to(torch.uint8)


def pad(codes: Tensor, zero_point: Tensor, padding: Sequence[int]) -> Tensor:
    """Pad uint8 `codes [B, C, H, W]` with `zero_point [1]`; the result is channels last.

    `padding`: rows above and below, columns left and right. Operators call this internally, hidden
    from `torch.compile`, whose generated code for a padded uint8 copy is slower than the conv.
    """
    if not any(padding):
        return codes.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = codes.shape
    top, left = padding
    shape = (batch, channels, height + 2 * top, width + 2 * left)
    # Not a padded copy of `zero_point`: torch.export would make it a constant, which is read-only.
    padded = torch.empty(
        shape, dtype=torch.uint8, device=codes.device, memory_format=torch.channels_last
    )
    padded.copy_(zero_point.to(torch.uint8).view(1, 1, 1, 1).expand(shape))
    padded[:, :, top : top + height, left : left + width] = codes
    return padded


def activated(x: Tensor, activation: str) -> Tensor:
    """`activation(x)`, in the dtype of `x`; `activation` is as in `fused.encode`."""
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    return x
