"""The log2 grid for values >= 0: `x ~ scale * 2^-code`, and its straight-through gradient.

Codes of `b` bits: 0 is `scale`, each further code half the one before, and the largest code,
`2^b - 1`, is zero. The smallest number above zero is `scale * 2^-(2^b - 2)`; up to `scale` the
error of what is not rounded to zero is at most a factor `sqrt(2)`, however many bits there are.

Shapes: `scale` broadcasts to `x`. Computed in the dtype of `x`, float32 or float64; codes are whole
numbers in that dtype until they are packed. `1 / scale` must be finite.

Source: TCAQ-DM (arXiv 2412.16700), Dynamically Adaptive Quantizer: codes
`clamp(round(-log2(x / scale)), 0, 2^b - 1)`. Deviation: there the largest code stands for
`scale * 2^-(2^b - 1)`, so that no code is zero. Of a sharp softmax at 3 bits most entries are far
below that number and would all be raised to it; rows would sum to several times 1 (a test holds the
comparison). From 5 bits on the two cannot be told apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics.bits import check_bits, max_code
from stepquant.support.errors import StepQuantError

# The smallest number above sqrt(1/2), which no float is equal to. So there are no ties, and
# `mantissa >= SQRT_HALF` is the exact comparison.
SQRT_HALF = {
    torch.float32: float.fromhex("0x1.6a09e8p-1"),
    torch.float64: float.fromhex("0x1.6a09e667f3bcdp-1"),
}


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 / scale)`: two roundings, the same ones wherever it is computed."""
    ratio = x * (1.0 / scale)
    if ratio.dtype not in SQRT_HALF:
        raise StepQuantError(
            f"values for the log2 grid are {ratio.dtype}: expected float32 or float64"
        )
    return ratio


def quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Codes `clamp(round(-log2(x / scale)), 0, 2^bits - 1)` as whole numbers in the dtype of `x`.

    Zero, and anything below it, gets the largest code, which stands for zero; NaN stays NaN.

    No logarithm is taken. With `r = x * (1 / scale)` in float32 and `r = m * 2^e`,
    `1/2 <= m < 1`, the code is `-e` for `m > sqrt(1/2)` and `1 - e` otherwise. Given `r` this is
    exact, so that every code path that computes `r` alike gives the same codes. On the bits `i` of
    a normal float32 it is `127 - ((i + 0x800000 - 0x3504F4) >> 23)`.
    """
    check_bits(bits, "bits of the log2 grid")
    ratio = _ratio(x, scale)
    mantissa, exponent = torch.frexp(ratio.clamp(max=1.0))
    codes = (mantissa < SQRT_HALF[ratio.dtype]).to(ratio.dtype) - exponent
    codes = torch.where(ratio > 0, codes.clamp(0, max_code(bits)), max_code(bits))
    return torch.where(ratio.isnan(), ratio, codes)


def dequantize_log2(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The real numbers that `codes` stand for: `scale * 2^-code`, and 0 for the largest code.

    Exact as long as it is a normal number. `2^-code` is 0 beyond code 149 in float32, which no
    scale up to 1 could tell.
    """
    powers = [2.0**-code for code in range(max_code(bits))] + [0.0]
    table = torch.tensor(powers, dtype=codes.dtype, device=codes.device)
    known = torch.where(codes.isnan(), 0, codes).to(torch.int32)
    return torch.where(codes.isnan(), codes, scale * table[known])


class _FakeQuantizeLog2(torch.autograd.Function):
    """Quantize and dequantize; gradients as autograd gives them through a straight-through round.

    Inside the grid: dx = quantized / x, dscale = 0. Above it (code 0 by clamping): dx = 0,
    dscale = 1. Where the result is zero: dx = 0, dscale = 0.
    """

    @staticmethod
    def forward(ctx, x, scale, bits):  # type: ignore[no-untyped-def]
        codes = quantize_log2(x, scale, bits)
        quantized = dequantize_log2(codes, scale, bits)
        ctx.save_for_backward(x, scale, quantized)
        return quantized

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, quantized = ctx.saved_tensors
        ratio = _ratio(x, scale)
        above = ratio >= 2 * SQRT_HALF[ratio.dtype]
        inside = (quantized > 0) & ~above
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            slope = quantized / torch.where(inside, x, 1)
            grad_x = torch.where(inside, grad * slope, 0)
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * above).sum_to_size(scale.shape)
        return grad_x, grad_scale, None


def fake_quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`x` rounded to its log2 grid and back, differentiable in `x` and `scale`.

    The gradient passes straight through the rounding of `-log2(x / scale)`: inside the grid it is
    `quantized / x`, between `sqrt(1/2)` and `sqrt(2)`, for `x`, and 0 for `scale`: to a
    straight-through eye the grid follows `x` wherever its levels lie. So `scale` learns from
    clipped values only, and where the levels lie between two octaves has to be searched.
    """
    return _FakeQuantizeLog2.apply(x, scale, bits)
