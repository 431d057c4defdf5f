"""The affine grid `x ~ scale * (code - zero_point)` and its straight-through gradient.

Shapes: `scale`, `zero_point`, and `bits` where it is a tensor broadcast against `x`. All arithmetic
is float32; codes are whole numbers held in float32 until they are packed.

Zero points are whole numbers for activations, so that zero is on the grid and zero padding exact.
Weights need no zero, so theirs may be half a step off (`halves`): with two or three bits, levels
such as -3/2, -1/2, 1/2, 3/2 lie better than -1, 0, 1, 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics.bits import max_code, max_codes


def clamp_codes(codes: Tensor, bits: int | Tensor) -> Tensor:
    """`codes` on the grid of `bits` bits; a tensor says how many, value by value."""
    if isinstance(bits, Tensor):
        return codes.clamp(min=0).minimum(max_codes(bits))
    return codes.clamp(0, max_code(bits))


def round_shifted(scaled: Tensor, zero_point: Tensor, halves: bool) -> Tensor:
    """`scaled + zero_point` rounded to whole numbers, before it is clamped."""
    if not halves:
        return torch.round(scaled) + zero_point
    whole = torch.floor(zero_point)
    return torch.round(scaled + (zero_point - whole)) + whole


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor, halves: bool = False
) -> Tensor:
    """Codes `clamp(round(x / scale) + zero_point, 0, 2^bits - 1)` as whole numbers in float32.

    Multiplies by `1 / scale`, as the integer runtime does, so that both round alike. `halves`:
    zero points may be half a step off a whole number; then it is `round(x / scale + zero_point)`.
    """
    return clamp_codes(round_shifted(x * (1.0 / scale), zero_point, halves), bits)


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
    def forward(ctx, x, scale, zero_point, bits, halves):  # type: ignore[no-untyped-def]
        zero = torch.round(2 * zero_point) / 2 if halves else torch.round(zero_point)
        ctx.save_for_backward(x, scale, zero)
        ctx.bits, ctx.halves = bits, halves
        return dequantize(quantize(x, scale, zero, bits, halves), scale, zero)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, zero = ctx.saved_tensors
        scaled = x * (1.0 / scale)
        free = round_shifted(scaled, zero, ctx.halves)
        code = clamp_codes(free, ctx.bits)
        inside = free == code
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            slope = torch.sub(code, zero).sub_(scaled.mul_(inside))
            grad_scale = slope.mul_(grad).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero = (grad * ~inside).mul_(-scale).sum_to_size(zero.shape)
        return grad_x, grad_scale, grad_zero, None, None


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor, halves: bool = False
) -> Tensor:
    """`x` rounded to its grid and back, differentiable in `x`, `scale` and `zero_point`.

    `zero_point` may be real (while it is trained); it is rounded here, to whole numbers or with
    `halves` to halves, with the gradient passed straight through. `scale`, `zero_point` and `bits`
    must broadcast to the shape of `x`.
    """
    return _FakeQuantize.apply(x, scale, zero_point, bits, halves)
