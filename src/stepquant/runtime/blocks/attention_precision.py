"""The dtype of the float products in quantized attention.

The choice depends only on the setting, the sizes and the CPU. So the products are the same whether
a block runs on codes or layer by layer (under a hook, a LoRA or a gradient).
"""

from __future__ import annotations

import functools

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

from stepquant.runtime.blocks.eligibility import is_encodable
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.straight_through import wants_gradient
from stepquant.runtime.ops import fused
from stepquant.support.errors import StepQuantError

MANY_SCORES = 128 * 128  # per head; fewer scores are faster in float32
AUTO, MODEL, BFLOAT16 = PRECISIONS = ("auto", "model", "bfloat16")


def set_attention_precision(model: nn.Module, precision: str) -> None:
    """Choose the dtype of the attention products of the quantized `model`.

    - "auto", the default: bfloat16 if the CPU multiplies it natively and a head has at least
      128 x 128 scores; otherwise the model's dtype.
    - "model": the model's dtype.
    - "bfloat16": bfloat16.

    The setting applies to attention with integer projections and float products (diffusers'
    `Attention`, as in UNets, DiT and PixArt). Checkpoints do not store it.

    Raises StepQuantError for any other precision, and if `model` has no such attention.
    """
    if precision not in PRECISIONS:
        raise StepQuantError(
            f"unknown attention precision '{precision}': expected one of {', '.join(PRECISIONS)}"
        )
    sites = [module for module in model.modules() if hasattr(module, "attention_precision")]
    if not sites:
        raise StepQuantError(
            f"{type(model).__name__} has no attention with integer projections: expected a packed "
            "denoiser of a UNet, DiT or PixArt, because only these have an attention precision"
        )
    for site in sites:
        site.attention_precision = precision  # type: ignore[assignment]


def product_dtype(attn: Attention, scores: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the products of `attn`.

    `scores`: queries times keys, per head. `dtype`: the dtype of the inputs, which are on the CPU
    and float32 or bfloat16 (`is_encodable`).
    """
    precision = getattr(attn, "attention_precision", AUTO)
    if precision == BFLOAT16:
        return torch.bfloat16
    native = precision == AUTO and scores >= MANY_SCORES and multiplies_bfloat16()
    return torch.bfloat16 if native else dtype


def rounds_products(attn: Attention, x: Tensor, context: Tensor | None) -> torch.dtype | None:
    """The dtype of the products if it differs from that of `x`; otherwise None.

    `x`: float `[B, N, C]` or `[B, C, H, W]`. `context`: float `[B, M, E]`, or None.
    """
    layers = (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
    if type(attn.processor) is not AttnProcessor2_0 or attn.is_causal:
        return None
    if not all([isinstance(layer, IntegerLayer) for layer in layers]):
        return None
    if not is_encodable(x) and getattr(attn, "attention_precision", AUTO) != BFLOAT16:
        return None
    queries = x.shape[1] if x.dim() == 3 else x.shape[2] * x.shape[3]
    keys = queries if context is None else context.shape[1]
    dtype = product_dtype(attn, queries * keys, x.dtype)
    return None if dtype == x.dtype else dtype


def rounded_products(
    attn: Attention,
    dtype: torch.dtype,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """The attention products in `dtype`, as a block on codes computes them.

    `query`: float `[B, H, N, D]`. `key`, `value`: float `[B, H, M, D]`. Returns `[B, H, N, D]` in
    the dtype of `query`.
    """
    q, k, v = (each.to(dtype) for each in (query, key, value))
    if mask is None and not wants_gradient(query, key, value) and _has_native(attn, dtype):
        # Dequantized codes of the output projection, which rounds them to the same codes again.
        grid = attn.to_out[0].prepared().grid()
        tokens = [each.transpose(1, 2).flatten(2) for each in (q, k, v)]
        code = fused.attention_codes(tokens[0], tokens[1], tokens[2], attn.heads, grid)
        scale, zero_point = grid.in_force()
        y = (code.to(torch.float32) - zero_point) * scale
        y = y if grid.factors is None else y / grid.factors
        return y.unflatten(-1, (attn.heads, -1)).transpose(1, 2).to(query.dtype)
    y = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask.to(dtype)
    )
    return y.to(query.dtype)


def takes_native(attn: Attention, dtype: torch.dtype, channels: int, mask: Tensor | None) -> bool:
    """Whether the native kernel computes the products and their codes.

    `dtype`: the dtype of the products. `channels`: of all heads together.
    """
    return (
        mask is None
        and dtype is torch.bfloat16
        and channels // attn.heads % 2 == 0
        and fused.has_native_attention()
    )


def _has_native(attn: Attention, dtype: torch.dtype) -> bool:
    project = attn.to_out[0]
    assert isinstance(project, IntegerLayer)
    return (
        takes_native(attn, dtype, attn.to_q.out_features, None)
        and project.lora is None
        and not project.weight_scale.is_meta  # offloaded: its tensors arrive with its call
        and len(project.splits) == 1
        and project.why_no_codes() is None
    )


@torch.compiler.assume_constant_result  # torch.compile cannot trace the query
def multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 multiply instructions (AVX512-BF16, AMX)."""
    return _multiplies_bfloat16()


@functools.cache
def _multiplies_bfloat16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
