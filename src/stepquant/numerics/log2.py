"""The log2 grid for values >= 0: `x ~ scale * 2^-code`, and its straight-through gradient.

On a grid of `b` bits, code 0 stands for `scale`, and each further code for half of the one before.
The largest code, `2^b - 1`, stands for zero. The smallest level above zero is
`scale * 2^-(2^b - 2)`. A value up to `scale` that does not round to zero is off by at most a factor
`sqrt(2)`, at any number of bits.

`scale` broadcasts to `x`. All arithmetic runs in the dtype of `x`, float32 or float64. Codes are
whole numbers in that dtype until they are packed. `1 / scale` must be finite.

Source: TCAQ-DM (arXiv 2412.16700), Dynamically Adaptive Quantizer: codes
`clamp(round(-log2(x / scale)), 0, 2^b - 1)`.

Deviation: in the paper the largest code stands for `scale * 2^-(2^b - 1)`, so that no code is zero.
At 3 bits, most entries of a sharp softmax are far below that level. The paper's grid would raise
them all to it, and rows would sum to several times 1 (a test compares both grids). From 5 bits on,
the two grids are indistinguishable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics.bits import check_bits, max_code
from stepquant.support.errors import StepQuantError

# The smallest float above sqrt(1/2). No float equals sqrt(1/2), so there are no ties, and
# `mantissa >= SQRT_HALF` compares exactly.
SQRT_HALF = {
    torch.float32: float.fromhex("0x1.6a09e8p-1"),
    torch.float64: float.fromhex("0x1.6a09e667f3bcdp-1"),
}


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    """Return `x * (1 / scale)`: two roundings, the same on every code path.

    Raises:
        StepQuantError: the result is neither float32 nor float64.
    """
    ratio = x * (1.0 / scale)
    if ratio.dtype not in SQRT_HALF:
        raise StepQuantError(
            f"values for the log2 grid are {ratio.dtype}: expected float32 or float64"
        )
    return ratio


def quantize_log2(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the codes `clamp(round(-log2(x / scale)), 0, 2^bits - 1)` of `x`.

    Codes are whole numbers in the dtype of `x`. Zero and negative values get the largest code,
    which stands for zero. NaN stays NaN.

    The function takes no logarithm. It writes `r = x * (1 / scale)` as `m * 2^e` with
    `1/2 <= m < 1`. The code is `-e` for `m > sqrt(1/2)` and `1 - e` otherwise. Given `r`, this is
    exact: every code path that computes `r` the same way gets the same codes. For a normal float32
    with the bits `i`, the code is `127 - ((i + 0x800000 - 0x3504F4) >> 23)`.

    Raises:
        StepQuantError: `bits` is not an int from 1 to 8, or `x` is neither float32 nor float64.
    """
    check_bits(bits, "bits of the log2 grid")
    ratio = _ratio(x, scale)
    mantissa, exponent = torch.frexp(ratio.clamp(max=1.0))
    codes = (mantissa < SQRT_HALF[ratio.dtype]).to(ratio.dtype) - exponent
    codes = torch.where(ratio > 0, codes.clamp(0, max_code(bits)), max_code(bits))
    return torch.where(ratio.isnan(), ratio, codes)


def dequantize_log2(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Dequantize `codes`: `scale * 2^-code`, and 0 for the largest code.

    The result is exact if it is a normal number. NaN stays NaN. In float32, `2^-code` is 0 beyond
    code 149. For scales up to 1, the product would be 0 there anyway.
    """
    powers = [2.0**-code for code in range(max_code(bits))] + [0.0]
    table = torch.tensor(powers, dtype=codes.dtype, device=codes.device)
    known = torch.where(codes.isnan(), 0, codes).to(torch.int32)
    return torch.where(codes.isnan(), codes, scale * table[known])


class _FakeQuantizeLog2(torch.autograd.Function):
    """Quantize and dequantize, with the gradients of straight-through rounding.

    - Inside the grid: dx = quantized / x, dscale = 0.
    - Above the grid (clamped to code 0): dx = 0, dscale = 1.
    - Where the result is zero: dx = 0, dscale = 0.
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
    """Round `x` to its log2 grid and back; differentiable in `x` and `scale`.

    The gradient passes straight through the rounding of `-log2(x / scale)`. Inside the grid it is
    `quantized / x` for `x`, between `sqrt(1/2)` and `sqrt(2)`, and 0 for `scale`: the
    straight-through estimate treats the quantized value as equal to `x`, at any scale. Only clipped
    values therefore train `scale`. The position of the levels within an octave must be searched.

    Raises:
        StepQuantError: `bits` is not an int from 1 to 8, or `x` is neither float32 nor float64.
    """
    return _FakeQuantizeLog2.apply(x, scale, bits)
