"""diffusers' `Attention`, with its two matrix products delegated to a replaceable module."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from stepquant.support.errors import StepQuantError

Products = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
PRODUCTS = ".processor.products"  # name of the products inside an attention module
PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0)
# Processors that compute plain attention, each in its own way.
OF_PLAIN_ATTENTION = (*PLAIN_PROCESSORS, SlicedAttnProcessor, XFormersAttnProcessor)


class ProductsProcessor(nn.Module):
    """Attention processor that delegates the two matrix products to the module `products`.

    Processors are diffusers' extension point for other attention code. `products` is called with
    queries `[B, H, N, D]`, keys and values `[B, H, M, D]`, and either an additive mask or None. It
    returns `[B, H, N, D]`. Everything else is as in diffusers' `AttnProcessor2_0`: norms,
    projections (which may be quantized layers), residual.
    """

    def __init__(self, products: nn.Module | None = None) -> None:
        super().__init__()
        if products is None:  # diffusers makes a processor like this one, for an IP-Adapter
            raise _refused("another processor")
        self.products = products

    def __call__(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Call `forward`; diffusers reads this signature to see which arguments it may pass."""
        return super().__call__(
            attention, hidden_states, encoder_hidden_states, attention_mask, temb
        )

    def forward(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """As `attention_with`, with these products."""
        return attention_with(
            self.products, attention, hidden_states, encoder_hidden_states, attention_mask, temb
        )


def attention_with(
    products: Products,
    attention: Attention,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> Tensor:
    """Return the output of `attention` for `hidden_states`, `[B, C, H, W]` or `[B, N, C]`.

    All but the `products` is as in diffusers' `AttnProcessor2_0`. `encoder_hidden_states` is the
    source of keys and values; None means `hidden_states`. A bool `attention_mask` is True at
    visible positions; any other mask is added to the scores. `temb` is passed to a spatial norm.
    """
    module: Any = attention  # its submodules have many types
    x = hidden_states
    if module.spatial_norm is not None:
        x = module.spatial_norm(x, temb)
    image_shape = x.shape if x.dim() == 4 else None
    if image_shape is not None:
        x = x.flatten(2).transpose(1, 2)  # [B, N, C]
    if module.group_norm is not None:
        x = module.group_norm(x.transpose(1, 2)).transpose(1, 2)
    source = x
    if encoder_hidden_states is not None:
        source = encoder_hidden_states
        if module.norm_cross:
            source = module.norm_encoder_hidden_states(source)

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (module.heads, -1)).transpose(1, 2)  # [B, H, N, D]

    query, key = heads(module.to_q(x)), heads(module.to_k(source))
    value = heads(module.to_v(source))
    if module.norm_q is not None:
        query = module.norm_q(query)
    if module.norm_k is not None:
        key = module.norm_k(key)
    mask = attention_mask
    if mask is not None:
        mask = module.prepare_attention_mask(mask, source.shape[1], x.shape[0])
        mask = mask.view(x.shape[0], module.heads, -1, mask.shape[-1])
        if mask.dtype == torch.bool:  # True marks visible positions
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    y = products(query, key, value, mask).transpose(1, 2).flatten(2)  # [B, N, C]
    for part in module.to_out:
        y = part(y)
    if image_shape is not None:
        y = y.transpose(1, 2).reshape(image_shape)
    if module.residual_connection:
        y = y + hidden_states
    return y / module.rescale_output_factor


def keeps_products(attention: Attention, processor: Any) -> bool:
    """Whether the quantized products of `attention` stay in the place of `processor`.

    They stay where `processor` computes plain attention in another way, which the user is warned
    of: slices and xformers give the same numbers in less memory, the quantized products others.

    Raises:
        StepQuantError: `processor` computes something else.
    """
    if not isinstance(attention.processor, ProductsProcessor):
        return False
    if isinstance(processor, ProductsProcessor):
        return False
    if type(processor) not in OF_PLAIN_ATTENTION:
        raise _refused(f"the processor {type(processor).__name__}")
    warnings.warn(
        f"attention's products are quantized, and stay so: {type(processor).__name__} is not used",
        stacklevel=3,
    )
    return True


def _refused(what: str) -> StepQuantError:
    return StepQuantError(
        f"an attention with quantized products got {what}: expected none, because it would drop "
        "the products; quantize without attention_bits, or call dequantize() first"
    )


def why_products_stay_float(module: nn.Module) -> str | None:
    """Return why an attention module's products cannot be quantized, or None if they can."""
    if not isinstance(module, Attention):
        return f"attention of the class {type(module).__name__}"
    processor: Any = module.processor
    if type(processor) not in PLAIN_PROCESSORS:  # a subclass may compute something else
        return f"attention with the processor {type(processor).__name__}"
    if not module.scale_qk:
        return "attention with unscaled scores"
    norms = module.norm_q is not None or module.norm_k is not None
    if isinstance(processor, AttnProcessor) and norms:
        return "attention whose processor leaves out its norms of queries and keys"
    if module.is_causal or module.added_kv_proj_dim is not None:
        return "causal attention, or attention with added keys and values"
    if module.pre_only:
        return "attention without an output projection"
    if module.inner_kv_dim != module.inner_dim or module.fused_projections:
        return "attention with shared or fused projections"
    return None
