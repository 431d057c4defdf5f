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


def scale_of(width: Tensor, levels: float, inverted: bool = True) -> Tensor:
    """The scale at which `levels` steps cover `width`: `width / levels`.

    An empty range gets scale 1. So does one so narrow that `1 / scale` would overflow, unless
    nobody inverts the scale (`inverted=False`).
    """
    scale = width / levels
    usable = torch.isfinite(1.0 / scale) if inverted else scale > 0
    return torch.where(usable, scale, torch.ones_like(scale))


def range_to_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)` of the affine grid that covers `[min(low, 0), max(high, 0)]`.

    Zero is always on the grid, so zero padding is exact. See `scale_of` for empty ranges.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = scale_of(high - low, max_code(bits))
    zero_point = torch.round(-low / scale).clamp(0, max_code(bits))
    return scale, zero_point


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; gradients as autograd gives them through a straight-through round.

    Inside the grid: dx = 1, dscale = round(x/scale) - x/scale, dzero_point = 0. Outside: dx = 0,
    dscale = code - zero_point, dzero_point = -scale. These are LSQ's gradients (Esser et al. 2020,
    equation 3) without its 1/sqrt(N * Qp) factor.

    This is the inner loop of all training on CPUs, bound by memory: few passes, few temporaries.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, bits, halves):  # type: ignore[no-untyped-def]
        zero = torch.round(2 * zero_point) / 2 if halves else torch.round(zero_point)
        free = round_shifted(x * (1.0 / scale), zero, halves)
        code = clamp_codes(free, bits)
        inside = free == code if any(ctx.needs_input_grad) else None
        y = code.sub_(zero).mul_(scale)  # `dequantize`
        ctx.save_for_backward(x, scale, inside, y)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, inside, y = ctx.saved_tensors
        grad_x = grad * inside
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            # scale times the slope: y - x inside the grid, y outside
            slope = torch.sub(y, x * inside)
            grad_scale = _dot_to_size(grad, slope, scale.shape) / scale
        if ctx.needs_input_grad[2]:
            # -scale times the sum of the gradient outside the grid
            grad_zero = (grad_x - grad).sum_to_size(scale.shape) * scale
        return grad_x, grad_scale, grad_zero, None, None


def _dot_to_size(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """`(a * b).sum_to_size(shape)`, without the product where `shape` is one number a row."""
    rows = shape.numel()
    by_rows = len(shape) == a.dim() and shape[0] == rows == a.shape[0]
    if (by_rows or rows == 1) and a.is_contiguous() and b.is_contiguous():
        return torch.linalg.vecdot(a.view(rows, -1), b.view(rows, -1)).view(shape)
    return (a * b).sum_to_size(shape)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor, halves: bool = False
) -> Tensor:
    """`x` rounded to its grid and back, differentiable in `x`, `scale` and `zero_point`.

    `zero_point` may be real (while it is trained); it is rounded here, to whole numbers or with
    `halves` to halves, with the gradient passed straight through. `scale`, `zero_point` and `bits`
    must broadcast to the shape of `x`.
    """
    return _FakeQuantize.apply(x, scale, zero_point, bits, halves)
