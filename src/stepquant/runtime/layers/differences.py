"""From packed codes to the whole numbers that kernels multiply, and back, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics import pack_bits, pack_channels, unpack_bits, unpack_channels
from stepquant.runtime.ops.layer_spec import LayerSpec


def differences_of(
    packed: Tensor, zero_point: Tensor, channel_bits: Tensor | None, spec: LayerSpec
) -> Tensor:
    """`code - zero point`, int8 `[C_out, C_in, kh, kw]` (linear: two dims), on one device.

    In half steps, `2 * code - 2 * zero point`, where the spec says `half_zero_points`. `packed`
    uint8 `[bytes]` of one input part; `zero_point` uint8 `[C_out]` as in the layer's buffer;
    `channel_bits` uint8 `[C_out]`, or None where all channels have `spec.weight_bits`.
    """
    if channel_bits is None:
        count = spec.out_channels * spec.columns
        codes = unpack_bits(packed, spec.weight_bits, count).view(spec.out_channels, -1)
    else:
        codes = unpack_channels(packed, channel_bits.to(torch.int64), spec.columns)
    if spec.half_zero_points:
        codes <<= 1
    # uint8 wraps around, and its bits are then those of the difference, which int8 holds.
    codes -= zero_point[:, None]
    return codes.view(torch.int8).view(spec.weight_shape)


def packed_of(
    differences: Tensor, zero_point: Tensor, channel_bits: Tensor | None, spec: LayerSpec
) -> Tensor:
    """The inverse of `differences_of`; uint8 `[bytes]` on the CPU."""
    codes = differences.flatten(1).contiguous().view(torch.uint8) + zero_point[:, None]
    if spec.half_zero_points:
        codes >>= 1
    if channel_bits is None:
        return pack_bits(codes, spec.weight_bits)
    return pack_channels(codes, channel_bits.to(torch.int64))
