"""The affine grid `x ~ scale * (code - zero_point)` and its straight-through gradient.

`scale`, `zero_point` and a `bits` tensor broadcast to the shape of `x`. All arithmetic is float32.
Codes are whole numbers held in float32 until they are packed.

Activation zero points are whole numbers. Zero is then on the grid, and zero padding is exact.
Weights do not need zero, so their zero points may be odd multiples of one half (`halves`). With two
or three bits, levels such as -3/2, -1/2, 1/2, 3/2 fit weights better than -1, 0, 1, 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics.bits import max_code, max_codes


def clamp_codes(codes: Tensor, bits: int | Tensor) -> Tensor:
    """Clamp `codes` to `0 .. 2^bits - 1`.

    A `bits` tensor broadcasts to `codes` and gives each value its own width.
    """
    if isinstance(bits, Tensor):
        return codes.clamp(min=0).minimum(max_codes(bits))
    return codes.clamp(0, max_code(bits))


def round_shifted(scaled: Tensor, zero_point: Tensor, halves: bool) -> Tensor:
    """Return `scaled + zero_point` rounded to whole numbers, before clamping.

    Without `halves`, `zero_point` must be a whole number. With `halves`, its fraction is added
    before the rounding and its whole part after it, so that no digits are lost.
    """
    if not halves:
        return torch.round(scaled) + zero_point
    whole = torch.floor(zero_point)
    return torch.round(scaled + (zero_point - whole)) + whole


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor, halves: bool = False
) -> Tensor:
    """Return the codes `clamp(round(x / scale) + zero_point, 0, 2^bits - 1)` of `x`.

    Codes are whole numbers in float32, in the shape of `x`. Ties round to even. The function
    multiplies by `1 / scale`, as the integer runtime does, so that both round alike.

    `halves` allows zero points that are odd multiples of one half. The rounding is then
    `round(x / scale + zero_point)`.
    """
    return clamp_codes(round_shifted(x * (1.0 / scale), zero_point, halves), bits)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Dequantize `codes`: `scale * (codes - zero_point)`."""
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
    """Return `(scale, zero_point)` of the grid that covers `[min(low, 0), max(high, 0)]`.

    Both have the shape of `low` and `high`. Zero is always on the grid, so zero padding is exact.
    See `scale_of` for empty ranges.
    Zero points are whole numbers in `0 .. 2^bits - 1`.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = scale_of(high - low, max_code(bits))
    zero_point = torch.round(-low / scale).clamp(0, max_code(bits))
    return scale, zero_point


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize, with the gradients of straight-through rounding.

    - Inside the grid: dx = 1, dscale = round(x/scale) - x/scale, dzero_point = 0.
    - Outside: dx = 0, dscale = code - zero_point, dzero_point = -scale.

    These are the gradients of LSQ (Esser et al. 2020, equation 3) without its 1/sqrt(N * Qp)
    factor.

    This is the inner loop of all training on CPUs, and memory bandwidth limits it. Keep passes and
    temporaries few.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, bits, halves):  # type: ignore[no-untyped-def]
        zero = torch.round(2 * zero_point) / 2 if halves else torch.round(zero_point)
        free = round_shifted(x * (1.0 / scale), zero, halves)
        code = clamp_codes(free, bits)
        inside = free == code if any(ctx.needs_input_grad) else None
        y = code.sub_(zero).mul_(scale)  # `dequantize`, in place
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
    """Return `(a * b).sum_to_size(shape)`.

    If `shape` is one number per row, or one in all, a dot product avoids storing `a * b`.
    """
    rows = shape.numel()
    by_rows = len(shape) == a.dim() and shape[0] == rows == a.shape[0]
    if (by_rows or rows == 1) and a.is_contiguous() and b.is_contiguous():
        return torch.linalg.vecdot(a.view(rows, -1), b.view(rows, -1)).view(shape)
    return (a * b).sum_to_size(shape)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int | Tensor, halves: bool = False
) -> Tensor:
    """Round `x` to its grid and back; differentiable in `x`, `scale` and `zero_point`.

    `scale`, `zero_point` and `bits` must broadcast to the shape of `x`. While `zero_point` is
    trained, it may be any real number. This function rounds it to whole numbers, or to multiples of
    one half with `halves`. Gradients pass straight through both roundings, as in LSQ (Esser et al.
    2020, equation 3) but without its 1/sqrt(N * Qp) factor.
    """
    return _FakeQuantize.apply(x, scale, zero_point, bits, halves)
