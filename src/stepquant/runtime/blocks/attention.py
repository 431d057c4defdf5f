"""diffusers' attention, on codes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from stepquant.models.attention_processor import attention_with, keeps_products
from stepquant.runtime.blocks.attention_precision import (
    product_dtype,
    rounded_products,
    rounds_products,
    takes_native,
)
from stepquant.runtime.blocks.eligibility import (
    A_HOOK,
    TRAINING,
    follows_gradient,
    is_encodable,
    untouched,
    why_no_codes,
)
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.prepared_layer import PreparedLayer
from stepquant.runtime.ops import fused
from stepquant.runtime.ops.fused import Output
from stepquant.support.errors import StepQuantError
from stepquant.support.refusal import Refusal, RefusalCode

OTHER_KIND = Refusal(RefusalCode.BLOCK, "an unsupported kind of attention")
OTHER_NORM = Refusal(RefusalCode.BLOCK, "a norm other than group norm")


class FastAttention(Attention):
    """`Attention` with norm and rounding for queries, keys and values in one pass over an image.

    It replaces the processor `AttnProcessor2_0`; with any other processor, diffusers' code runs.
    The attention products stay float, and `attention_precision` chooses their dtype.
    """

    attention_precision: str  # see `set_attention_precision`

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As `Attention`.

        `hidden_states`: float `[B, C, H, W]` or `[B, N, C]`; the result has the same shape.
        """
        x, context = hidden_states, encoder_hidden_states
        # Only the spatial norm reads a time embedding, and `why_plain` refuses it.
        if (
            not kwargs.keys() <= {"temb"}
            or not fits(self, x, context)
            or (self.group_norm is not None and x.dim() != 4)
            or why_plain(self) is not None
            or follows_gradient(self, x, context, attention_mask)
        ):
            dtype = rounds_products(self, x, context) if kwargs.keys() <= {"temb"} else None
            if dtype is None:
                return super().forward(x, context, attention_mask, **kwargs)
            products = functools.partial(rounded_products, self, dtype)
            return attention_with(products, self, x, context, attention_mask, **kwargs)
        if self.group_norm is not None:
            inputs = _normed_image(self, x)
        else:
            tokens = x if x.dim() == 3 else x.flatten(2).transpose(1, 2).contiguous()
            inputs = encoded(self, tokens, context)
        tokens = x if x.dim() == 3 else x.permute(0, 2, 3, 1).flatten(1, 2)
        residual = tokens if self.residual_connection else None
        y = attend(self, inputs, attention_mask, x.dtype, residual)
        if x.dim() == 4:
            y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return y if self.rescale_output_factor == 1.0 else y / self.rescale_output_factor

    def set_processor(self, processor: Any) -> None:
        """As `Attention`, except that quantized products stay in place; see `keeps_products`."""
        if not keeps_products(self, processor):
            super().set_processor(processor)

    def fuse_projections(self, fuse: bool = True) -> None:
        """As `Attention`.

        Raises StepQuantError for packed projections; `layers.fusion` refuses for a whole model.
        """
        if fuse and isinstance(self.to_q, IntegerLayer):
            raise StepQuantError(
                "fuse_qkv_projections was called on a packed denoiser: expected a float one, "
                "because quantized projections have codes of their own; load the float denoiser"
            )
        super().fuse_projections(fuse)

    def why_plain(self) -> Refusal | None:
        """Why the block runs diffusers' code for every input, or None."""
        return why_plain(self)


def projections(attn: Attention) -> list[IntegerLayer]:
    """The layers that compute queries, keys and values."""
    return [attn.to_q, attn.to_k, attn.to_v]


def fits(attn: Attention, x: Tensor, context: Tensor | None) -> bool:
    """Whether `attend` can compute `attn` for these inputs, provided `why_plain` returns None."""
    if not is_encodable(x):
        return False
    return context is None or not (attn.norm_cross or attn.group_norm is not None)


def why_plain(attn: Attention) -> Refusal | None:
    """Why `attn` runs diffusers' code for every input, or None."""
    if type(attn.processor) is not AttnProcessor2_0:
        return Refusal(
            RefusalCode.ATTENTION_PROCESSOR,
            f"the attention processor {type(attn.processor).__name__}",
        )
    if attn.training:
        return TRAINING
    norms = (attn.spatial_norm, attn.norm_q, attn.norm_k)
    if any([norm is not None for norm in norms]) or attn.fused_projections or attn.is_causal:
        return OTHER_KIND
    if not isinstance(attn.group_norm, nn.GroupNorm | None):
        return OTHER_NORM
    for inner in (attn.group_norm, *attn.to_out[1:]):
        if inner is not None and not untouched(inner):
            return A_HOOK
    for layer in (*projections(attn), attn.to_out[0]):
        reason = why_no_codes(layer, parts=1)
        if reason is not None:
            return reason
    return None


def encoded(attn: Attention, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """uint8 codes for the query, key and value projections.

    `x`: float `[B, N, C]`. `context`: float `[B, M, E]`, the input of keys and values; None: `x`.
    """
    query = attn.to_q.prepared().encode(x)[0]
    return [query, *encoded_sources(attn, x if context is None else context)]


def encoded_sources(attn: Attention, source: Tensor) -> list[Tensor]:
    """uint8 codes of `source [B, M, E]` for the key and the value projection."""
    return [layer.prepared().encode(source)[0] for layer in (attn.to_k, attn.to_v)]


def _normed_image(attn: Attention, image: Tensor) -> list[Tensor]:
    """Codes `[B, H * W, C]` of the group-normed `image [B, C, H, W]` for the three projections."""
    norm, channels = attn.group_norm, image.shape[1]
    outputs = [Output(0, channels, layer.prepared().grid(), (0, 0)) for layer in projections(attn)]
    found = fused.group_norm_encode(
        (image,), None, norm.num_groups, norm.weight, norm.bias, norm.eps, "none", outputs
    )
    return [code.permute(0, 2, 3, 1).flatten(1, 2) for code in found]


def attend(
    attn: Attention,
    inputs: Sequence[Tensor],
    mask: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Attention and its output projection, times `gate`, plus `residual`: `[B, N, C]`.

    Args:
        attn: The attention module; its projections are integer layers.
        inputs: uint8 codes for queries `[B, N, C]`, keys `[B, M, E]` and values `[B, M, E]`.
        mask: The attention mask as diffusers passes it.
        dtype: The dtype of the model and of the result. `product_dtype` chooses that of the
            products, whose result the output projection rounds to fewer bits anyway.
        residual: Float `[B, N, C]`.
        gate: Float `[B, C]`, one factor per sample and channel.
    """
    inner = product_dtype(attn, inputs[0].shape[1] * inputs[1].shape[1], dtype)
    query, key, value = (
        layer.prepared().run([code], dtype=inner)
        for layer, code in zip(projections(attn), inputs, strict=True)
    )
    project: PreparedLayer = attn.to_out[0].prepared()
    if takes_native(attn, inner, query.shape[-1], mask):
        code = fused.attention_codes(query, key, value, attn.heads, project.grid())
        return project.run([code], residual, dtype, gate=gate)
    query, key, value = (
        each.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value)
    )
    if mask is not None:
        batch, length = key.shape[0], key.shape[2]
        mask = attn.prepare_attention_mask(mask, length, batch)
        mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        mask = mask if mask.dtype == torch.bool else mask.to(inner)
    y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    y = y.transpose(1, 2).flatten(2)
    return project.run(project.encode(y), residual, dtype, gate=gate)
