"""Upsampling of diffusers' UNets, on codes."""

from __future__ import annotations

from typing import Any

from diffusers.models.upsampling import Upsample2D
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.layers import codes
from stepquant.runtime.layers.integer import IntegerConv2d
from stepquant.runtime.ops import fused
from stepquant.runtime.ops.encoding import pad


class FastUpsample2D(Upsample2D):
    """Rounds before it repeats pixels: equal values have equal codes."""

    def forward(
        self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As `Upsample2D`: `[B, C, H, W]`, twice as high and wide or `output_size`."""
        x = hidden_states
        if not self._runs_on_codes(x):
            return super().forward(x, output_size, *args, **kwargs)
        grid = codes.grid_of(self.conv)
        code = fused.encode(x, "none", grid)
        if output_size is None:
            code = functional.interpolate(code, scale_factor=2.0, mode="nearest")
        else:
            code = functional.interpolate(code, size=output_size, mode="nearest")
        padded = pad(code, grid.in_force()[1], self.conv.spec.padding)
        return codes.run(self.conv, [padded], dtype=x.dtype)

    def _runs_on_codes(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype in codes.FLOATS
            and x.shape[1] == self.channels  # or diffusers says that it is not
            and self.why_plain() is None
        )

    def why_plain(self) -> str | None:
        """Why the block runs the code of diffusers whatever it is called with, or None."""
        if self.name != "conv" or self.norm is not None or not self.interpolate:
            return "an upsampler of another kind"
        if not isinstance(self.conv, IntegerConv2d):
            return "an upsampler without a packed conv"
        return codes.why_not_from_outside(self.conv, parts=1)
