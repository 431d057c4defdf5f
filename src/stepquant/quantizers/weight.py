"""Weight quantizer: one affine grid per out-channel."""

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
    """Return `(scale, zero_point)`, each `[C_out]`, for weights in `[low, high]` per out-channel.

    Eight-bit grids are symmetric around code 128, so that `code - zero_point` fits in int8. Grids
    of fewer bits are affine, and the difference always fits. The scale is 1 where `1 / scale` would
    overflow.
    """
    if bits < 8:
        return range_to_grid(low, high, bits)
    scale = scale_of(torch.maximum(low.abs(), high.abs()), max_code(8) - WEIGHT_ZERO_POINT_8BIT)
    return scale, torch.full_like(scale, WEIGHT_ZERO_POINT_8BIT)


def minmax_weight_range(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`(scale, zero_point)`, each `[C_out]`, that covers all of `weight [C_out, K]`."""
    return weight_grid(weight.amin(dim=1), weight.amax(dim=1), bits)


class WeightQuantizer(nn.Module):
    """Per-out-channel quantizer of a weight `[C_out, C_in, ...]`.

    - `scale [C_out]`: float32, trainable.
    - `zero_point [C_out]`: float32, whole numbers or halves, not trained.
    - `channel_bits [C_out]`: uint8, the bits of each out-channel; all equal to `bits` unless bits
      are mixed.

    Raises:
        StepQuantError: `bits` is not an int from 1 to 8.
    """

    def __init__(self, bits: int, out_channels: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, "weight bits")
        self.scale = nn.Parameter(torch.ones(out_channels))
        self.zero_point: Tensor
        self.channel_bits: Tensor
        # A buffer: DilateQuant trains weights and weight scales, not their zero points.
        self.register_buffer("zero_point", torch.zeros(out_channels))
        self.register_buffer(
            "channel_bits", torch.full((out_channels,), self.bits, dtype=torch.uint8)
        )

    def fit(self, weight: Tensor, find: GridSearch) -> None:
        """Fit each out-channel's grid to `weight [C_out, ...]` with `find`, at its own bits."""
        rows = weight.detach().flatten(1)  # [C_out, K]
        for bits in self.channel_bits.unique().tolist():
            members = self.channel_bits == bits
            self.scale.data[members], self.zero_point[members] = find(rows[members], bits)

    def forward(self, weight: Tensor) -> Tensor:
        """Fake-quantize `weight [C_out, ...]`."""
        scale, zero_point, bits = self.rows(weight.dim())
        return fake_quantize(weight, scale, zero_point, bits, halves=True)

    def differences(self, weight: Tensor) -> Tensor:
        """Return `code - zero_point` of `weight [C_out, ...]`, whole numbers or halves, float32."""
        scale, zero_point, bits = self.rows(weight.dim())
        return quantize(weight, scale, zero_point, bits, halves=True) - zero_point

    def codes(self, weight: Tensor) -> Tensor:
        """Return the codes of `weight [C_out, ...]` as uint8 of the same shape."""
        return quantize(weight, *self.rows(weight.dim()), halves=True).to(torch.uint8)

    def rows(self, dimensions: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(scale, zero_point, bits)`, shaped to broadcast over `dimensions` dimensions."""
        shape = (-1,) + (1,) * (dimensions - 1)
        return self.scale.view(shape), self.zero_point.view(shape), self.channel_bits.view(shape)

    def extra_repr(self) -> str:
        """Describe the quantizer for `print(model)`."""
        return f"bits={self.bits}, out_channels={self.scale.numel()}"
