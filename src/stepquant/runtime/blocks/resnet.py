"""The residual block of diffusers' UNets, on codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from stepquant.runtime.blocks.eligibility import (
    A_HOOK,
    TRAINING,
    follows_gradient,
    is_encodable,
    untouched,
    why_no_codes,
)
from stepquant.runtime.layers.integer import IntegerConv2d
from stepquant.runtime.ops import fused
from stepquant.support.refusal import Refusal, RefusalCode

OTHER_NORM = Refusal(RefusalCode.BLOCK, "a norm other than group norm")
OTHER_FORM = Refusal(RefusalCode.BLOCK, "a norm or activation other than group norm and SiLU")
RESIZES = Refusal(RefusalCode.BLOCK, "a resnet block that resizes")


class FastResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D` with each norm, its SiLU and the rounding fused into one pass.

    The second pass also adds the time embedding, and the last conv's kernel adds the residual.
    """

    def forward(
        self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As `ResnetBlock2D`.

        `input_tensor`: float `[B, C_in, H, W]`. `temb`: float `[B, E]`, or None. Returns
        `[B, C_out, H, W]`.
        """
        inputs = (input_tensor, temb)
        if not self._runs_on_codes(*inputs) or follows_gradient(self, *inputs):
            return super().forward(input_tensor, temb, *args, **kwargs)
        return self._of_parts((input_tensor,), temb)

    def joined(self, parts: Sequence[Tensor], temb: Tensor | None) -> Tensor:
        """The block's result for `parts [B, C_i, H, W]` concatenated over channels.

        The fast path reads the parts in place, without a copy. `temb`: float `[B, E]`, or None.
        Returns `[B, C_out, H, W]`.
        """
        alike = all([part.dtype == parts[0].dtype for part in parts])
        if (
            alike
            and untouched(self)
            and self._runs_on_codes(parts[0], temb)
            and not follows_gradient(self, *parts, temb)
        ):
            return self._of_parts(parts, temb)
        return self(torch.cat(list(parts), dim=1), temb)

    def _of_parts(self, parts: Sequence[Tensor], temb: Tensor | None) -> Tensor:
        y = self.conv1.prepared().run(_normed(self.norm1, parts, None, self.conv1))
        added = None
        if self.time_emb_proj is not None:
            assert temb is not None
            activation = "none" if self.skip_time_act else "silu"
            project = self.time_emb_proj.prepared()
            added = project.run(project.encode(temb, activation))
            added = added.expand(len(y), -1)  # all samples may share one embedding
        inner = _normed(self.norm2, (y,), added, self.conv2)
        dtype, scaled = parts[0].dtype, self.output_scale_factor != 1.0
        if self.conv_shortcut is not None:
            shortcut = self.conv_shortcut.prepared()
            residual = shortcut.run(shortcut.encode_parts(parts))
        else:
            residual = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)
        y = self.conv2.prepared().run(
            *(inner, residual, torch.float32 if scaled else dtype),
            overwrite=self.conv_shortcut is not None,
        )
        return y.div_(self.output_scale_factor).to(dtype) if scaled else y

    def _runs_on_codes(self, x: Tensor, temb: Tensor | None) -> bool:
        return (
            is_encodable(x)
            and (temb is None) == (self.time_emb_proj is None)
            and self.why_plain() is None
        )

    def why_plain(self) -> Refusal | None:
        """Why the block runs diffusers' code for every input, or None."""
        if self.time_embedding_norm != "default" or not isinstance(self.nonlinearity, nn.SiLU):
            return OTHER_FORM
        if self.upsample is not None or self.downsample is not None:
            return RESIZES
        if self.training:
            return TRAINING
        if not all([isinstance(norm, nn.GroupNorm) for norm in (self.norm1, self.norm2)]):
            return OTHER_NORM
        inner = (self.norm1, self.norm2, self.nonlinearity, self.dropout)
        if not all([untouched(module) for module in inner]):
            return A_HOOK
        for layer in (self.conv1, self.conv2, self.conv_shortcut, self.time_emb_proj):
            reason = why_no_codes(layer)
            if reason is not None:
                return reason
        return None


def _normed(
    norm: nn.GroupNorm, parts: Sequence[Tensor], added: Tensor | None, conv: IntegerConv2d
) -> list[Tensor]:
    """Codes of `silu(norm(cat(parts) + added))`, one tensor for each input part of `conv`."""
    outputs = conv.prepared().outputs()
    return fused.group_norm_encode(
        parts, added, norm.num_groups, norm.weight, norm.bias, norm.eps, "silu", outputs
    )
