"""Learned rounding: AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.numerics import dequantize
from stepquant.numerics.affine import clamp_codes
from stepquant.quantizers.weight import WeightQuantizer
from stepquant.support.errors import StepQuantError

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to this range, then clamped to 0..1


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """Return `h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)`: the share by which a weight rounds up."""
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def rounding_logits(share: Tensor) -> Tensor:
    """Invert `rectified_sigmoid`: return the `V` with `h(V) = share`, for shares in 0..1."""
    return torch.logit((share - GAMMA) / (ZETA - GAMMA))


class SoftRounding(nn.Module):
    """A weight between its two neighbouring grid points, with one variable `V` for each value.

        w_q = s (clip(floor(w / s + z) + h(V), 0, 2^b - 1) - z)

    `logits [C_out, C_in, ...]` hold `V`, float32. Without an earlier rounding they start at
    `w_q = w` wherever `w` lies inside the grid. After an earlier rounding they start about half-way
    between `w` and its earlier code.

    Scales, zero points (whole numbers or halves) and bits are copies of the quantizer's present
    values, per out-channel. The quantizer's values must not change while the rounding is trained.
    """

    floor: Tensor  # next codes below the weight, unclamped, [C_out, C_in, ...]
    scale: Tensor  # [C_out, 1, ...], as are `zero_point` and `bits`
    zero_point: Tensor
    bits: Tensor

    def __init__(
        self, quantizer: WeightQuantizer, weight: Tensor, rounded: Tensor | None = None
    ) -> None:
        """Start the rounding of the float `weight [C_out, C_in, ...]` on the grids of `quantizer`.

        `rounded` is the weight at the codes of an earlier rounding, if there was one.

        Raises:
            StepQuantError: weight and quantizer differ in their number of out-channels.
        """
        super().__init__()
        scale, zero_point, bits = (value.detach().clone() for value in quantizer.rows(weight.dim()))
        if weight.shape[0] != scale.shape[0]:
            raise StepQuantError(
                f"a weight of {weight.shape[0]} out-channels is to be rounded on the grids of "
                f"{scale.shape[0]}: expected one grid for each out-channel"
            )
        # Add the whole part of the zero point last, as the quantizer does, to lose no digits.
        whole = torch.floor(zero_point)
        free = weight.detach() * (1.0 / scale) + (zero_point - whole)
        floor = torch.floor(free)
        share = free - floor
        if rounded is not None:
            up = quantizer.codes(rounded) > clamp_codes(floor + whole, bits)
            # Slightly more than half-way, so that hard rounding gives the earlier codes at first.
            share = torch.lerp(share, up.to(share.dtype), 0.51)
        self.logits = nn.Parameter(rounding_logits(share))
        self.register_buffer("floor", floor + whole)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("bits", bits)

    def forward(self) -> Tensor:
        """Return the softly rounded weight `[C_out, C_in, ...]`, differentiable in `logits`."""
        return self._weight(rectified_sigmoid(self.logits))

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """Return the weight at its codes, rounded up where `h(V) >= 1/2`.

        The quantizer maps this weight to the same codes.
        """
        return self._weight((self.logits >= 0).to(self.floor.dtype))

    def _weight(self, up: Tensor) -> Tensor:
        codes = clamp_codes(self.floor + up, self.bits)
        return dequantize(codes, self.scale, self.zero_point)
