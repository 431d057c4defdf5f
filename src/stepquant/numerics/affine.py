"""The affine grid `x ~ scale * (code - zero_point)` and its straight-through gradient.

Shapes: `scale` and `zero_point` broadcast against `x`. All arithmetic is float32; codes are whole
numbers held in float32 until they are packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics.bits import max_code


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes `clamp(round(x / scale) + zero_point, 0, 2^bits - 1)` as whole numbers in float32.

    Multiplies by `1 / scale`, as the integer runtime does, so that both round alike.
    """
    return torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, 0, max_code(bits))


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The real numbers that `codes` stand for: `scale * (codes - zero_point)`."""
    return (codes - zero_point) * scale


def range_to_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)` of the affine grid that covers `[min(low, 0), max(high, 0)]`.

    Zero is always on the grid, so zero padding is exact. An empty range gets scale 1, and so does
    one so narrow that `1 / scale` would overflow.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / max_code(bits)
    scale = torch.where(torch.isfinite(1.0 / scale), scale, torch.ones_like(scale))
    zero_point = torch.round(-low / scale).clamp(0, max_code(bits))
    return scale, zero_point


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; gradients as autograd gives them through a straight-through round.

    Inside the grid: dx = 1, dscale = round(x/scale) - x/scale, dzero_point = 0. Outside: dx = 0,
    dscale = code - zero_point, dzero_point = -scale. These are LSQ's gradients (Esser et al. 2020,
    equation 3) without its 1/sqrt(N * Qp) factor.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, bits):  # type: ignore[no-untyped-def]
        zero = torch.round(zero_point)
        ctx.save_for_backward(x, scale, zero)
        ctx.bits = bits
        return dequantize(quantize(x, scale, zero, bits), scale, zero)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, zero = ctx.saved_tensors
        scaled = x * (1.0 / scale)
        free = torch.round(scaled) + zero
        code = free.clamp(0, max_code(ctx.bits))
        inside = free == code
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            slope = torch.sub(code, zero).sub_(scaled.mul_(inside))
            grad_scale = slope.mul_(grad).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero = (grad * ~inside).mul_(-scale).sum_to_size(zero.shape)
        return grad_x, grad_scale, grad_zero, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """`x` rounded to its grid and back, differentiable in `x`, `scale` and `zero_point`.

    `zero_point` may be real (while it is trained); it is rounded here, with the gradient passed
    straight through. `scale` and `zero_point` must broadcast to the shape of `x`.
    """
    return _FakeQuantize.apply(x, scale, zero_point, bits)
