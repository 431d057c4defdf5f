"""The transformer block of diffusers' UNets, DiT and PixArt, on codes."""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor, nn

from stepquant.runtime.blocks.attention import (
    OTHER_KIND,
    attend,
    encoded,
    encoded_sources,
    fits,
    projections,
    why_plain,
)
from stepquant.runtime.blocks.eligibility import (
    A_HOOK,
    TRAINING,
    follows_gradient,
    untouched,
    why_no_codes,
)
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.ops import fused
from stepquant.support.refusal import Refusal, RefusalCode

NORM_TYPES = ("layer_norm", "ada_norm_zero", "ada_norm_single")
CHUNKED = Refusal(RefusalCode.BLOCK, "chunked feed-forward layers or cross-attention only")
NO_EMBEDDING = Refusal(RefusalCode.BLOCK, "a norm without an embedding")
OTHER_NORM = Refusal(RefusalCode.BLOCK, "a norm other than layer norm")
Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale and gate, each [B, C]


class FastBasicTransformerBlock(BasicTransformerBlock):
    """`BasicTransformerBlock` on codes.

    One pass fuses norm, modulation and rounding; another fuses activation and rounding.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """As `BasicTransformerBlock`: float `[B, N, C]`, and a result of the same shape."""
        x, context = hidden_states, encoder_hidden_states
        inputs = (x, context, timestep, attention_mask, encoder_attention_mask)
        if (
            cross_attention_kwargs
            or not self._runs_on_codes(x, context)
            or follows_gradient(self, *inputs)
        ):
            return super().forward(
                x, attention_mask, context, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        first, second = self._modulations(x, timestep, class_labels)
        norm = self.norm1.norm if isinstance(self.norm1, AdaLayerNormZero) else self.norm1
        codes = _normed(norm, x, first, projections(self.attn1))
        gate = None if first is None else first[2]
        x = attend(self.attn1, codes, attention_mask, x.dtype, x, gate)
        if self.attn2 is not None:
            if self.norm_type == "ada_norm_single":  # PixArt has no norm here
                codes = encoded(self.attn2, x, context)
            elif context is None:
                codes = _normed(self.norm2, x, None, projections(self.attn2))
            else:
                (query,) = _normed(self.norm2, x, None, [self.attn2.to_q])
                codes = [query, *encoded_sources(self.attn2, context)]
            x = attend(self.attn2, codes, encoder_attention_mask, x.dtype, x)
        norm = self.norm2 if self.norm_type == "ada_norm_single" else self.norm3
        widen, _, narrow = self.ff.net[:3]
        (code,) = _normed(norm, x, second, [widen.proj])
        gated, tanh = isinstance(widen, GEGLU), getattr(widen, "approximate", "none") == "tanh"
        activation = "gelu_tanh" if tanh and not gated else "gelu"
        narrow = narrow.prepared()
        inner = widen.proj.prepared().run_to_codes(code, activation, gated, narrow.grid(), x.dtype)
        gate = None if second is None else second[2]
        return narrow.run([inner], x, x.dtype, gate=gate)

    def _modulations(
        self, x: Tensor, timestep: Tensor | None, class_labels: Tensor | None
    ) -> tuple[Modulation | None, Modulation | None]:
        """The modulations of attention and feed-forward layers; None for blocks without them."""
        if self.norm_type == "ada_norm_zero":
            norm = self.norm1
            embedding = norm.emb(timestep, class_labels, hidden_dtype=x.dtype)
            values = norm.linear(norm.silu(embedding)).unflatten(1, (6, -1))
        elif self.norm_type == "ada_norm_single":
            assert timestep is not None
            values = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)
        else:
            return None, None
        shift, scale, gate, later_shift, later_scale, later_gate = values.unbind(1)
        return (shift, scale, gate), (later_shift, later_scale, later_gate)

    def _runs_on_codes(self, x: Tensor, context: Tensor | None) -> bool:
        return (
            x.dim() == 3
            and fits(self.attn1, x, None)
            and (self.attn2 is None or fits(self.attn2, x, context))
            and self.why_plain() is None
        )

    def why_plain(self) -> Refusal | None:
        """Why the block runs diffusers' code for every input, or None."""
        if self.norm_type not in NORM_TYPES or self.pos_embed is not None:
            return Refusal(RefusalCode.BLOCK, f"the norm type {self.norm_type}")
        if self._chunk_size is not None or self.only_cross_attention:
            return CHUNKED
        if self.training:
            return TRAINING
        norms = [self.norm1, self.norm2, getattr(self, "norm3", None)]
        if isinstance(self.norm1, AdaLayerNormZero):
            if self.norm1.emb is None:
                return NO_EMBEDDING
            norms.append(self.norm1.norm)
        for norm in norms:
            if not isinstance(norm, nn.LayerNorm | AdaLayerNormZero | None):
                return OTHER_NORM
            if norm is not None and not untouched(norm):
                return A_HOOK
        for site in (self.attn1, self.attn2):
            reason = None if site is None else _why_not_site(site)
            if reason is not None:
                return reason
        return _why_not_feed(self.ff)


def _why_not_site(site: Attention) -> Refusal | None:
    """Why the block cannot run the attention `site` on codes, or None."""
    if not untouched(site):
        return A_HOOK
    if site.group_norm is not None or site.residual_connection or site.rescale_output_factor != 1.0:
        return OTHER_KIND
    return why_plain(site)


def _why_not_feed(feed: FeedForward) -> Refusal | None:
    """Why the block cannot run `feed` on codes, or None.

    It needs two packed layers that take codes, with GELU or GEGLU between them.
    """
    widen, narrow = feed.net[0], feed.net[2]
    if type(widen) not in (GELU, GEGLU):
        return Refusal(RefusalCode.BLOCK, f"a feed-forward network with {type(widen).__name__}")
    if not all([untouched(module) for module in (feed, *feed.net)]):
        return A_HOOK
    reason = why_no_codes(widen.proj, parts=1)
    return why_no_codes(narrow, parts=1) if reason is None else reason


def _normed(
    norm: nn.LayerNorm, x: Tensor, modulation: Modulation | None, layers: list[IntegerLayer]
) -> list[Tensor]:
    """Codes of the normed and modulated `x [B, N, C]`, one tensor for each of `layers`."""
    shift, scale = (None, None) if modulation is None else modulation[:2]
    grids = [layer.prepared().grid() for layer in layers]
    return fused.layer_norm_encode(x, norm.weight, norm.bias, norm.eps, scale, shift, grids)
