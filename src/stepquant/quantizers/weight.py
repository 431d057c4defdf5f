"""Weight quantizer: per out-channel affine grid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepquant.numerics import (
    WEIGHT_ZERO_POINT_8BIT,
    check_bits,
    fake_quantize,
    max_code,
    quantize,
    range_to_grid,
    scale_of,
)

# (weight [C, K], bits) -> (scale [C], zero point [C])
GridSearch = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def weight_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[C_out]`, for weights in `[low, high]` per out-channel.

    Eight bits are symmetric around code 128, so that `code - zero_point` fits in int8; fewer bits
    are affine, where it always fits.
    """
    if bits < 8:
        return range_to_grid(low, high, bits)
    scale = scale_of(torch.maximum(low.abs(), high.abs()), max_code(8) - WEIGHT_ZERO_POINT_8BIT)
    return scale, torch.full_like(scale, WEIGHT_ZERO_POINT_8BIT)


def minmax_weight_range(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[C_out]`, that covers all of `weight [C_out, K]`."""
    return weight_grid(weight.amin(dim=1), weight.amax(dim=1), bits)


class WeightQuantizer(nn.Module):
    """The grids of a weight `[C_out, C_in, ...]`, one for each out-channel.

    `scale [C_out]`, `zero_point [C_out]` (whole numbers or halves), `channel_bits [C_out]` uint8:
    how many bits each out-channel has, `bits` everywhere unless they were mixed.
    """

    def __init__(self, bits: int, out_channels: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, "weight bits")
        self.scale = nn.Parameter(torch.ones(out_channels))
        self.zero_point: Tensor
        self.channel_bits: Tensor
        # Not trained: DilateQuant lists weights and weight scales only.
        self.register_buffer("zero_point", torch.zeros(out_channels))
        self.register_buffer(
            "channel_bits", torch.full((out_channels,), self.bits, dtype=torch.uint8)
        )

    def fit(self, weight: Tensor, find: GridSearch) -> None:
        """Give each out-channel of `weight [C_out, ...]` the grid that `find` has for its bits."""
        rows = weight.detach().flatten(1)  # [C_out, K]
        for bits in self.channel_bits.unique().tolist():
            members = self.channel_bits == bits
            self.scale.data[members], self.zero_point[members] = find(rows[members], bits)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize `weight [C_out, ...]`."""
        scale, zero_point, bits = self.rows(weight.dim())
        return fake_quantize(weight, scale, zero_point, bits, halves=True)

    def differences(self, weight: Tensor) -> Tensor:
        """`code - zero point` of `weight [C_out, ...]`, whole numbers or halves, as float32."""
        scale, zero_point, bits = self.rows(weight.dim())
        return quantize(weight, scale, zero_point, bits, halves=True) - zero_point

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of `weight [C_out, ...]` as uint8 of the same shape."""
        return quantize(weight, *self.rows(weight.dim()), halves=True).to(torch.uint8)

    def rows(self, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
        """`(scale, zero_point, bits)`, shaped to go with a weight of so many dimensions."""
        shape = (-1,) + (1,) * (dimensions - 1)
        return self.scale.view(shape), self.zero_point.view(shape), self.channel_bits.view(shape)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"bits={self.bits}, out_channels={self.scale.numel()}"
