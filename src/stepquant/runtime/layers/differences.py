"""Conversion between packed codes and the int8 weights that kernels multiply, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.numerics import pack_bits, pack_channels, unpack_bits, unpack_channels
from stepquant.runtime.ops.layer_spec import LayerSpec


def differences_of(
    packed: Tensor, zero_point: Tensor, channel_bits: Tensor | None, spec: LayerSpec
) -> Tensor:
    """`code - zero point`, int8 `[C_out, C_in, kh, kw]`, or `[C_out, C_in]` for linear layers.

    If the spec sets `half_zero_points`, the result counts half steps: `2 * code - 2 * zero point`.
    All arguments are on one device.

    Args:
        packed: uint8 `[bytes]`, the packed codes of one input part.
        zero_point: uint8 `[C_out]`, as in the layer's buffer.
        channel_bits: uint8 `[C_out]`; None if all channels have `spec.weight_bits`.
        spec: The spec of the input part.
    """
    if channel_bits is None:
        count = spec.out_channels * spec.columns
        codes = unpack_bits(packed, spec.weight_bits, count).view(spec.out_channels, -1)
    else:
        codes = unpack_channels(packed, channel_bits.to(torch.int64), spec.columns)
    if spec.half_zero_points:
        codes <<= 1
    # uint8 arithmetic wraps around, so the bits are those of the difference, which fits in int8.
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
