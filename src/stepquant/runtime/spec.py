"""What a kernel must know of a layer before it runs."""

from __future__ import annotations

from dataclasses import dataclass

from stepquant.numerics import max_code


@dataclass(frozen=True)
class LayerSpec:
    """Shape and bits of one input part of a packed layer; a linear layer is a 1x1 conv here."""

    kind: str  # "linear" or "conv2d"
    in_channels: int
    out_channels: int
    weight_bits: int
    activation_bits: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def columns(self) -> int:
        """Weights per out-channel."""
        return self.in_channels * self.kernel_size[0] * self.kernel_size[1]

    @property
    def largest_weight(self) -> int:
        """Bound of `|code - zero point|` of the weights."""
        return 128 if self.weight_bits == 8 else max_code(self.weight_bits)

    @property
    def pair_overflows_int16(self) -> bool:
        """Whether two products of extreme codes exceed int16, where non-VNNI kernels saturate."""
        return 2 * max_code(self.activation_bits) * self.largest_weight > 32767
