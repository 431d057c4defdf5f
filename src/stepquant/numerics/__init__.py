"""Pure tensor functions: bit widths, affine and log2 grids, attention products, code packing."""

from stepquant.numerics.affine import dequantize, fake_quantize, quantize, range_to_grid, scale_of
from stepquant.numerics.bits import WEIGHT_ZERO_POINT_8BIT, check_bits, max_code, max_codes
from stepquant.numerics.log2 import dequantize_log2, fake_quantize_log2, quantize_log2
from stepquant.numerics.packing import (
    pack_bits,
    pack_channels,
    packed_size,
    unpack_bits,
    unpack_channels,
    unpack_nibbles,
)

__all__ = [
    "WEIGHT_ZERO_POINT_8BIT",
    "check_bits",
    "dequantize",
    "dequantize_log2",
    "fake_quantize",
    "fake_quantize_log2",
    "max_code",
    "max_codes",
    "pack_bits",
    "pack_channels",
    "packed_size",
    "quantize",
    "quantize_log2",
    "range_to_grid",
    "scale_of",
    "unpack_bits",
    "unpack_channels",
    "unpack_nibbles",
]
