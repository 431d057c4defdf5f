"""Upsampling of diffusers' UNets, on codes."""

from __future__ import annotations

from typing import Any

from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.blocks.eligibility import follows_gradient, is_encodable, why_no_codes
from stepquant.runtime.layers.integer import IntegerConv2d
from stepquant.runtime.ops import fused
from stepquant.runtime.ops.encoding import pad
from stepquant.support.refusal import Refusal, RefusalCode

OTHER_KIND = Refusal(RefusalCode.BLOCK, "an unsupported kind of upsampler")
NO_INTEGER_CONV = Refusal(RefusalCode.LAYER, "an upsampler without an integer convolution")


class FastUpsample2D(Upsample2D):
    """`Upsample2D` that encodes before it repeats pixels, because equal values have equal codes."""

    def forward(
        self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As `Upsample2D`.

        `hidden_states`: float `[B, C, H, W]`. The result has twice the height and width, or
        `output_size`.
        """
        x = hidden_states
        if not self._runs_on_codes(x) or follows_gradient(self, x):
            return super().forward(x, output_size, *args, **kwargs)
        conv = self.conv.prepared()
        grid = conv.grid()
        code = fused.encode(x, "none", grid)
        if output_size is None:
            code = functional.interpolate(code, scale_factor=2.0, mode="nearest")
        else:
            code = functional.interpolate(code, size=output_size, mode="nearest")
        padded = pad(code, grid.in_force()[1], self.conv.spec.padding)
        return conv.run([padded], dtype=x.dtype)

    def _runs_on_codes(self, x: Tensor) -> bool:
        return (
            is_encodable(x)
            and x.shape[1] == self.channels  # otherwise diffusers' code raises its error
            and self.why_plain() is None
        )

    def why_plain(self) -> Refusal | None:
        """Why the block runs diffusers' code for every input, or None."""
        if self.name != "conv" or self.norm is not None or not self.interpolate:
            return OTHER_KIND
        if not isinstance(self.conv, IntegerConv2d):
            return NO_INTEGER_CONV
        return why_no_codes(self.conv, parts=1)
