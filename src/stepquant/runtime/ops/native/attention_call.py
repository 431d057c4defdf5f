"""Calls the native attention kernel with tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.native import Library, checks, structures
from stepquant.runtime.ops.native.calls import fail, grid_structure

_pack_attention = structures.ATTENTION.pack


def attention_codes(
    library: Library, query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid
) -> Tensor:
    """See `fused.attention_codes`; operands are bfloat16 and not empty, and `d` is even.

    The kernel multiplies in bfloat16, rounds exponentials to bfloat16 and sums in float32.
    """
    assert library.attention is not None
    batch, queries, channels = query.shape
    keys, head_dim = key.shape[1], channels // heads
    checks.attention_codes(query, key, value, heads, grid)
    query, key, value = (_rows(each) for each in (query, key, value))
    result = torch.empty((batch, queries, channels), dtype=torch.uint8, device="cpu")
    status = library.attention(
        _pack_attention(
            *(query.data_ptr(), key.data_ptr(), value.data_ptr()),
            *(query.stride(1), key.stride(1), value.stride(1)),
            *(batch, heads, head_dim, queries, keys, result.data_ptr()),
            grid_structure(grid),
        ),
        head_dim**-0.5,
        torch.get_num_threads(),
    )
    if status:
        fail(status)
    return result


def _rows(x: Tensor) -> Tensor:
    """`x` if the kernel can read it in place, otherwise a contiguous copy."""
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    pairs = x.stride(1) % 2 == 0  # the kernel reads values in pairs
    if x.stride(2) == 1 and even and pairs:
        return x
    # Not `contiguous`, which keeps arbitrary strides of dimensions of size 1.
    return x.clone(memory_format=torch.contiguous_format)
