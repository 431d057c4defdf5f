"""The weight of a simulated layer: its parts and grids, and what training adds to it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from stepquant.quantizers.low_rank import LowRankAdapter
from stepquant.quantizers.rounding import SoftRounding
from stepquant.quantizers.weight import GridSearch, WeightQuantizer


class TrainableWeight(nn.Module):
    """Base class of the simulated layers: a float weight that is rounded on grids of its own.

    - `weight [C_out, C_in, ...]`: float32, trainable.
    - `splits`: number of in-channels of each input part; each part has a quantizer.
    - `adapter`: low-rank change that training adds to the weight, or None.
    - `roundings`: learned rounding of each part's weight while it is trained. They are not
      submodules: training ends by writing its result into `weight`, so the state dict is the same
      with and without them.
    """

    weight: nn.Parameter
    splits: tuple[int, ...]
    weight_quantizers: nn.ModuleList
    adapter: LowRankAdapter | None
    roundings: tuple[SoftRounding, ...]

    def weight_parts(self) -> tuple[Tensor, ...]:
        """Return the weight of each part, `[C_out, C_part, ...]`, with the adapter's change."""
        return self.merged_weight().split(self.splits, dim=1)

    def quantized_parts(self) -> Iterator[tuple[WeightQuantizer, Tensor]]:
        """Yield quantizer and weight of each part.

        The weight is `[C_out, C_part, ...]`, with the adapter's change.
        """
        for quantizer, weight in zip(self.weight_quantizers, self.weight_parts(), strict=True):
            assert isinstance(quantizer, WeightQuantizer)
            yield quantizer, weight

    @property
    def channel_bits(self) -> Tensor:
        """Weight bits of each out-channel, uint8 `[C_out]`; the same in every part."""
        quantizer = self.weight_quantizers[0]
        assert isinstance(quantizer, WeightQuantizer)
        return quantizer.channel_bits

    def set_channel_bits(self, bits: Tensor) -> None:
        """Set the weight bits of each out-channel to `bits [C_out]`.

        The weight grids must then be fitted again.
        """
        for quantizer in self.weight_quantizers:
            assert isinstance(quantizer, WeightQuantizer)
            quantizer.channel_bits.copy_(bits)

    def fit_weights(self, find: GridSearch) -> None:
        """Fit the weight grids of every part with `find`."""
        for quantizer, weight in self.quantized_parts():
            quantizer.fit(weight, find)

    def attach_adapter(self, adapter: LowRankAdapter) -> None:
        """Add `adapter` to the weight from now on, before quantization."""
        self.adapter = adapter

    def merge_adapter(self) -> None:
        """Merge the adapter's change into `weight` and remove the adapter."""
        if self.adapter is not None:
            self.weight.data.copy_(self.merged_weight().detach())
            self.adapter = None

    def merged_weight(self) -> Tensor:
        """Return the weight with the adapter's change, `[C_out, C_in, ...]`."""
        if self.adapter is None:
            return self.weight
        return self.weight + self.adapter().view_as(self.weight)

    def attach_roundings(self, weight: Tensor) -> None:
        """Train the rounding of `weight [C_out, C_in, ...]` from now on, not the weight itself.

        While gradients are recorded, the layer computes with the softly rounded weight. Otherwise
        it computes with its own weight, which stays unchanged until `settle_roundings`. If its own
        weight differs from `weight`, it is the result of an earlier rounding of `weight`, and the
        new rounding starts there.
        """
        again = not torch.equal(weight, self.weight)
        pairs = zip(self.quantized_parts(), weight.split(self.splits, dim=1), strict=True)
        self.roundings = tuple(
            SoftRounding(quantizer, part, own if again else None)
            for (quantizer, own), part in pairs
        )

    @torch.no_grad()
    def settle_roundings(self) -> None:
        """Write the weight at its learned codes into `weight`; the roundings stay attached."""
        if self.roundings:
            rounded = [rounding.rounded() for rounding in self.roundings]
            self.weight.copy_(torch.cat(rounded, dim=1))

    def detach_roundings(self) -> None:
        """Remove the roundings; the layer then computes with its own weight alone."""
        self.roundings = ()

    def quantized_weight(self) -> Tensor:
        """Return the fake-quantized weight `[C_out, C_in, ...]`, differentiable.

        With roundings attached, it is the softly rounded weight, which may lie between grid points.
        """
        if self.roundings:
            parts = [rounding() for rounding in self.roundings]
        else:
            parts = [quantizer(weight) for quantizer, weight in self.quantized_parts()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
