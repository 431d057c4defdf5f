"""Calls the native integer product with tensors; `ops.fused` says what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import Library, checks, structures
from stepquant.runtime.ops.native.calls import fail, grid_structure
from stepquant.runtime.ops.native.structures import ACTIVATIONS
from stepquant.runtime.ops.native.tiled_weight import Weight
from stepquant.runtime.ops.result_shapes import shape_of

_pack_codes = structures.CODES.pack
_pack_result, _pack_encoded = structures.RESULT.pack, structures.ENCODED.pack


def _image(codes: Tensor, spec: LayerSpec, sizes: tuple[int, ...]) -> bytes:
    """The C struct of `codes`, which are not empty: contiguous, or channels-last images."""
    if spec.kind == "linear":
        batch, channels = codes.shape[0] if codes.dim() > 1 else 1, spec.in_channels
        rows = codes.numel() // (batch * channels)
        return _pack_codes(
            *(codes.data_ptr(), batch, 1, rows, channels),
            *(rows * channels, rows * channels, channels, 1, 1, channels, channels),
        )
    batch, channels, frame_height, frame_width = codes.shape
    (stride_h, stride_w), (dilation_h, dilation_w) = spec.stride, spec.dilation
    row = frame_width * channels
    return _pack_codes(
        *(codes.data_ptr(), batch, sizes[2], sizes[3], channels),
        *(frame_height * row, stride_h * row, stride_w * channels),
        *(*spec.kernel_size, dilation_h * row, dilation_w * channels),
    )


def products(
    library: Library,
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    added: Tensor | None,
    overwrite: bool,
    dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """See `fused.tiled_product`; `codes` are not empty."""
    assert library.products is not None
    sizes, memory_format = shape_of(codes, spec)
    codes = codes.contiguous(memory_format=memory_format)
    checks.product_operands(sizes, spec, added, gate)
    if gate is not None and (gate.dtype is not torch.float32 or gate.stride(1) != 1):
        gate = gate.to(torch.float32).contiguous()
    if added is not None:
        added = added.contiguous(memory_format=memory_format)
    if added is not None and overwrite and added.dtype is dtype:
        result = added
    else:
        result = torch.empty(sizes, dtype=dtype, device="cpu", memory_format=memory_format)
    status = library.products(
        _image(codes, spec, sizes),
        weight.structure,
        grid_structure(grid),
        _pack_result(
            *(result.data_ptr(), dtype is torch.bfloat16),
            *(0 if added is None else added.data_ptr(), _is_bf16(added)),
            *((0, 0) if gate is None else (gate.data_ptr(), gate.stride(0))),
        ),
        None,
        torch.get_num_threads(),
    )
    if status:
        fail(status)
    return result


def product_codes(
    library: Library,
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    activation: str,
    gated: bool,
    output_grid: Grid,
) -> Tensor:
    """See `fused.tiled_product_codes`; `codes` are not empty."""
    assert library.products is not None and spec.kind == "linear"
    sizes, _ = shape_of(codes, spec)
    codes = codes.contiguous()
    output_grid.check_channels(sizes[-1] // 2 if gated else sizes[-1])
    shape = (*sizes[:-1], sizes[-1] // 2) if gated else sizes
    result = torch.empty(shape, dtype=torch.uint8, device="cpu")
    grid_out = grid_structure(output_grid)
    encoded = _pack_encoded(result.data_ptr(), ACTIVATIONS[activation], gated, grid_out)
    status = library.products(
        _image(codes, spec, sizes),
        weight.structure,
        grid_structure(grid),
        None,
        encoded,
        torch.get_num_threads(),
    )
    if status:
        fail(status)
    return result


def _is_bf16(x: Tensor | None) -> bool:
    return x is not None and x.dtype is torch.bfloat16
