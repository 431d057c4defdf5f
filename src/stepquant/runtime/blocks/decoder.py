"""Decoder stages of diffusers' UNets that read skip connections in place, without `torch.cat`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn

from stepquant.runtime.blocks.resnet import FastResnetBlock2D

Skips = tuple[Tensor, ...]


def joins_in_resnets(stage: Any) -> bool:
    """Whether the resnets of a decoder stage can take hidden states and skips as separate parts."""
    freeu = all(getattr(stage, name, None) for name in ("s1", "s2", "b1", "b2"))
    checkpointing = torch.is_grad_enabled() and stage.gradient_checkpointing
    return (
        not freeu
        and not checkpointing
        and all(isinstance(resnet, FastResnetBlock2D) for resnet in stage.resnets)
    )


class FastUpBlock2D(UpBlock2D):
    """Resnets, then upsampling; the resnets read each skip connection in place."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Skips,
        temb: Tensor | None = None,
        upsample_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As `UpBlock2D`.

        `hidden_states`: float `[B, C, H, W]`. `res_hidden_states_tuple`: the encoder's images
        `[B, C_i, H, W]`; the first resnet takes the last one. Returns float `[B, C_out, H', W']`.
        """
        x, skips = hidden_states, res_hidden_states_tuple
        if not joins_in_resnets(self):
            return super().forward(x, skips, temb, upsample_size, *args, **kwargs)
        for number, resnet in enumerate(self.resnets, 1):
            x = resnet.joined((x, skips[-number]), temb)
        return _upsampled(self.upsamplers, x, upsample_size)


class FastAttnUpBlock2D(AttnUpBlock2D):
    """Alternating resnets and self-attentions, then upsampling."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Skips,
        temb: Tensor | None = None,
        upsample_size: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """As `AttnUpBlock2D`; see `FastUpBlock2D`."""
        x, skips = hidden_states, res_hidden_states_tuple
        if not joins_in_resnets(self) or self.upsample_type == "resnet":
            return super().forward(x, skips, temb, upsample_size, *args, **kwargs)
        pairs = zip(self.resnets, self.attentions, strict=False)
        for number, (resnet, attention) in enumerate(pairs, 1):
            x = attention(resnet.joined((x, skips[-number]), temb))
        return _upsampled(self.upsamplers, x)


class FastCrossAttnUpBlock2D(CrossAttnUpBlock2D):
    """Alternating resnets and transformers, then upsampling."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Skips,
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """As `CrossAttnUpBlock2D`; see `FastUpBlock2D`."""
        x, skips = hidden_states, res_hidden_states_tuple
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if not joins_in_resnets(self):
            return super().forward(x, skips, temb, upsample_size=upsample_size, **conditions)
        pairs = zip(self.resnets, self.attentions, strict=False)
        for number, (resnet, attention) in enumerate(pairs, 1):
            x = resnet.joined((x, skips[-number]), temb)
            x = attention(x, return_dict=False, **conditions)[0]
        return _upsampled(self.upsamplers, x, upsample_size)


def _upsampled(upsamplers: nn.ModuleList | None, x: Tensor, *size: int | None) -> Tensor:
    for upsampler in upsamplers or ():
        x = upsampler(x, *size)
    return x
