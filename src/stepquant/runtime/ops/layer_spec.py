"""The description of a layer that kernels need: its shape and bits."""

from __future__ import annotations

from dataclasses import dataclass

from stepquant.numerics import max_code, packed_size

# Differences in half steps, `2 * code - 2 * zero point`, must fit in int8.
MOST_BITS_WITH_HALVES = 6


@dataclass(frozen=True)
class LayerSpec:
    """Shape and bits of one input part of an integer layer; a linear layer counts as a 1x1 conv.

    - `weight_bits`: the largest number of bits of an out-channel.
    - `channel_counts`: `(bits, out-channels)` pairs, fewest bits first; None if all out-channels
      have the same bits.
    - `half_zero_points`: whether the weight's zero points count half steps.
    """

    kind: str  # "linear" or "conv2d"
    in_channels: int
    out_channels: int
    weight_bits: int
    activation_bits: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    channel_counts: tuple[tuple[int, int], ...] | None = None
    half_zero_points: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(C_out, C_in)`, followed by the kernel size for convs."""
        shape = (self.out_channels, self.in_channels)
        return shape + self.kernel_size if self.kind == "conv2d" else shape

    @property
    def columns(self) -> int:
        """Weights per out-channel."""
        return self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a conv's result, for a padded image of `height x width`."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1

    @property
    def packed_bytes(self) -> int:
        """Size of the packed weight, in bytes."""
        counts = self.channel_counts or ((self.weight_bits, self.out_channels),)
        return sum(packed_size(channels * self.columns, bits) for bits, channels in counts)

    @property
    def mean_weight_bits(self) -> float:
        """Bits per weight, averaged over all out-channels."""
        counts = self.channel_counts or ((self.weight_bits, self.out_channels),)
        return sum(bits * channels for bits, channels in counts) / self.out_channels

    @property
    def largest_weight(self) -> int:
        """Upper bound of `|code - zero point|`, in half steps if `half_zero_points`."""
        largest = 128 if self.weight_bits == 8 else max_code(self.weight_bits)
        return 2 * largest if self.half_zero_points else largest

    @property
    def pair_overflows_int16(self) -> bool:
        """Whether the sum of two products can exceed int16, at which non-VNNI kernels saturate."""
        return 2 * max_code(self.activation_bits) * self.largest_weight > 32767
