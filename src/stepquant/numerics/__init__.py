"""Pure tensor functions: bit facts, the affine grid, straight-through gradients, packing."""

from stepquant.numerics.affine import dequantize, fake_quantize, quantize, range_to_grid
from stepquant.numerics.bits import WEIGHT_ZERO_POINT_8BIT, check_bits, max_code, max_codes
from stepquant.numerics.packing import (
    pack_bits,
    pack_channels,
    packed_size,
    unpack_bits,
    unpack_channels,
)

__all__ = [
    "WEIGHT_ZERO_POINT_8BIT",
    "check_bits",
    "dequantize",
    "fake_quantize",
    "max_code",
    "max_codes",
    "pack_bits",
    "pack_channels",
    "packed_size",
    "quantize",
    "range_to_grid",
    "unpack_bits",
    "unpack_channels",
]
