"""What a kernel must know of a layer before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from stepquant.numerics import max_code, packed_size

# Differences in half steps, `2 * code - 2 * zero point`, must fit in int8.
MOST_BITS_WITH_HALVES = 6


@dataclass(frozen=True)
class LayerSpec:
    """Shape and bits of one input part of a packed layer; a linear layer is a 1x1 conv here.

    `weight_bits`: the most bits of an out-channel. `channel_counts`: `(bits, out-channels)` pairs,
    fewest bits first, where out-channels differ. `half_zero_points`: the weights' zero points are
    counted in half steps.
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
        """`(C_out, C_in)`, and the kernel's size where it is a conv layer."""
        shape = (self.out_channels, self.in_channels)
        return shape + self.kernel_size if self.kind == "conv2d" else shape

    @property
    def columns(self) -> int:
        """Weights per out-channel."""
        return self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    def result_size(self, height: int, width: int) -> tuple[int, int]:
        """Of a conv's result, for an image `height x width` with its padding around it."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        return (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1

    @property
    def packed_bytes(self) -> int:
        """Bytes that the packed weight takes."""
        counts = self.channel_counts or ((self.weight_bits, self.out_channels),)
        return sum(packed_size(channels * self.columns, bits) for bits, channels in counts)

    @property
    def mean_weight_bits(self) -> float:
        """Bits per weight, over all out-channels."""
        counts = self.channel_counts or ((self.weight_bits, self.out_channels),)
        return sum(bits * channels for bits, channels in counts) / self.out_channels

    @property
    def largest_weight(self) -> int:
        """Bound of `|code - zero point|` of the weights, in half steps where these count."""
        largest = 128 if self.weight_bits == 8 else max_code(self.weight_bits)
        return 2 * largest if self.half_zero_points else largest

    @property
    def pair_overflows_int16(self) -> bool:
        """Whether two products of extreme codes exceed int16, where non-VNNI kernels saturate."""
        return 2 * max_code(self.activation_bits) * self.largest_weight > 32767
