"""The resnet of diffusers' UNets, on codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from stepquant.runtime.layers import codes
from stepquant.runtime.layers.integer import IntegerConv2d
from stepquant.runtime.ops import fused


class FastResnetBlock2D(ResnetBlock2D):
    """Norm, SiLU and rounding in one pass; the time embedding joins the second one's.

    The residual is added in the last conv's kernel.
    """

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As `ResnetBlock2D`: `input_tensor [B, C_in, H, W]`, `temb [B, E]`: `[B, C_out, H, W]`."""
        if not self._runs_on_codes(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        return self._of_parts((input_tensor,), temb)

    def joined(self, parts: Sequence[Tensor], temb: Tensor | None) -> Tensor:
        """What calling the block with `parts [B, C_i, H, W]`, joined over channels, gives."""
        alike = all([part.dtype == parts[0].dtype for part in parts])
        if alike and codes.untouched(self) and self._runs_on_codes(parts[0], temb):
            return self._of_parts(parts, temb)
        return self(torch.cat(list(parts), dim=1), temb)

    def _of_parts(self, parts: Sequence[Tensor], temb: Tensor | None) -> Tensor:
        y = codes.run(self.conv1, _normed(self.norm1, parts, None, self.conv1))
        added = None
        if self.time_emb_proj is not None:
            assert temb is not None
            activation = "none" if self.skip_time_act else "silu"
            added = codes.run(
                self.time_emb_proj, codes.encode(self.time_emb_proj, temb, activation)
            )
            added = added.expand(len(y), -1)  # one embedding may be for all samples
        inner = _normed(self.norm2, (y,), added, self.conv2)
        dtype, scaled = parts[0].dtype, self.output_scale_factor != 1.0
        shortcut = self.conv_shortcut
        if shortcut is not None:
            residual = codes.run(shortcut, codes.encode_parts(shortcut, parts))
        else:
            residual = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        y = codes.run(
            *(self.conv2, inner, residual, torch.float32 if scaled else dtype),
            overwrite=shortcut is not None,
        )
        return y.div_(self.output_scale_factor).to(dtype) if scaled else y

    def _runs_on_codes(self, x: Tensor, temb: Tensor | None) -> bool:
        return (
            x.device.type == "cpu"
            and x.dtype in codes.FLOATS
            and (temb is None) == (self.time_emb_proj is None)
            and self.why_plain() is None
        )

    def why_plain(self) -> str | None:
        """Why the block runs the code of diffusers whatever it is called with, or None."""
        if self.time_embedding_norm != "default" or not isinstance(self.nonlinearity, nn.SiLU):
            return "another norm or activation than group norm and SiLU"
        if self.upsample is not None or self.downsample is not None:
            return "a resnet that changes the size"
        if self.training:
            return "training mode"
        if not all([isinstance(norm, nn.GroupNorm) for norm in (self.norm1, self.norm2)]):
            return "another norm than group norm"
        inner = (self.norm1, self.norm2, self.nonlinearity, self.dropout)
        if not all([codes.untouched(module) for module in inner]):
            return "a hook"
        for layer in (self.conv1, self.conv2, self.conv_shortcut, self.time_emb_proj):
            reason = codes.why_not_from_outside(layer)
            if reason is not None:
                return reason
        return None


def _normed(
    norm: nn.GroupNorm, parts: Sequence[Tensor], added: Tensor | None, conv: IntegerConv2d
) -> list[Tensor]:
    """The codes for `conv` of `silu(norm(parts + added))`."""
    return fused.group_norm_encode(
        parts, added, norm.num_groups, norm.weight, norm.bias, norm.eps, "silu", codes.outputs(conv)
    )
