"""Weight quantizer: per out-channel affine grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.numerics import (
    WEIGHT_ZERO_POINT_8BIT,
    check_bits,
    fake_quantize,
    quantize,
    range_to_grid,
)


def weight_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[C_out]`, for weights in `[low, high]` per out-channel.

    Eight bits are symmetric around code 128, so that `code - zero_point` fits in int8; fewer bits
    are affine, where it always fits.
    """
    if bits < 8:
        return range_to_grid(low, high, bits)
    scale = torch.maximum(low.abs(), high.abs()) / 127
    scale = torch.where(torch.isfinite(1.0 / scale), scale, torch.ones_like(scale))
    return scale, torch.full_like(scale, WEIGHT_ZERO_POINT_8BIT)


class WeightQuantizer(nn.Module):
    """`scale [C_out]` and `zero_point [C_out]` of a weight `[C_out, C_in, ...]`."""

    def __init__(self, bits: int, out_channels: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, "weight bits")
        self.scale = nn.Parameter(torch.ones(out_channels))
        self.zero_point: Tensor
        # Not trained: DilateQuant lists weights and weight scales only.
        self.register_buffer("zero_point", torch.zeros(out_channels))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Cover `[low, high]`, each `[C_out]`."""
        scale, zero_point = weight_grid(low, high, self.bits)
        self.scale.data.copy_(scale)
        self.zero_point.data.copy_(zero_point)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize `weight [C_out, ...]`."""
        shape = (-1,) + (1,) * (weight.dim() - 1)
        return fake_quantize(weight, self.scale.view(shape), self.zero_point.view(shape), self.bits)

    def differences(self, weight: Tensor) -> Tensor:
        """`code - zero point` of `weight [C_out, ...]`, whole numbers in float32."""
        shape = (-1,) + (1,) * (weight.dim() - 1)
        zero_point = torch.round(self.zero_point).view(shape)
        return quantize(weight, self.scale.view(shape), zero_point, self.bits) - zero_point

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of `weight [C_out, ...]` as uint8 of the same shape."""
        shape = (-1,) + (1,) * (weight.dim() - 1)
        zero_point = torch.round(self.zero_point).view(shape)
        return quantize(weight, self.scale.view(shape), zero_point, self.bits).to(torch.uint8)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"bits={self.bits}, out_channels={self.scale.numel()}"
