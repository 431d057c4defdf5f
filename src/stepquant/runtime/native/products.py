"""The native integer product called with tensors; `kernels.native` says what it computes."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.runtime.grids import Grid
from stepquant.runtime.native import Library
from stepquant.runtime.native.calls import ACTIVATION_CODES, fail, grid_structure
from stepquant.runtime.spec import LayerSpec

_CODES = struct.Struct("12q").pack
_WEIGHT = struct.Struct("6q").pack
_RESULT = struct.Struct("6q").pack
_ENCODED = struct.Struct("3q").pack


class Weight(NamedTuple):
    """A layer's tensors as the kernel reads them, and the structure that says where they lie."""

    tiles: Tensor
    """int8, see `kernels.native.lay_out`"""
    scale: Tensor
    """float32 `[C_out]`"""
    sums: Tensor
    """int32 `[C_out]`"""
    bias: Tensor | None
    """float32 `[C_out]`"""
    step_bias: Tensor | None
    """float32 `[T, C_out]`"""
    structure: bytes


def weight_of(
    tiles: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None
) -> Weight:
    """The tensors with their structure; all contiguous, on the CPU, of the types of `Weight`."""
    at = [0 if each is None else each.data_ptr() for each in (scale, sums, bias, step_bias)]
    structure = _WEIGHT(tiles.data_ptr(), scale.shape[0], *at)
    return Weight(tiles, scale, sums, bias, step_bias, structure)


class Image(NamedTuple):
    """Codes as the kernel reads them, and what comes of them."""

    codes: Tensor
    structure: bytes
    shape: tuple[int, ...]
    memory_format: torch.memory_format


def image_of(codes: Tensor, spec: LayerSpec) -> Image:
    """`codes` of a layer: `[B, C, H + 2 ph, W + 2 pw]`, channels last, or `[B, ..., C]`."""
    out_channels = spec.out_channels
    if spec.kind == "linear":
        codes = codes.contiguous()
        channels, batch = spec.in_channels, codes.shape[0] if codes.dim() > 1 else 1
        rows = codes.numel() // (batch * channels)
        structure = _CODES(
            *(codes.data_ptr(), batch, 1, rows, channels),
            *(rows * channels, rows * channels, channels, 1, 1, channels, channels),
        )
        return Image(codes, structure, (*codes.shape[:-1], out_channels), torch.contiguous_format)
    batch, channels, frame_height, frame_width = codes.shape
    (kernel_h, kernel_w), (stride_h, stride_w) = spec.kernel_size, spec.stride
    dilation_h, dilation_w = spec.dilation
    height = (frame_height - dilation_h * (kernel_h - 1) - 1) // stride_h + 1
    width = (frame_width - dilation_w * (kernel_w - 1) - 1) // stride_w + 1
    row = frame_width * channels
    structure = _CODES(
        *(codes.data_ptr(), batch, height, width, channels),
        *(frame_height * row, stride_h * row, stride_w * channels),
        *(kernel_h, kernel_w, dilation_h * row, dilation_w * channels),
    )
    return Image(codes, structure, (batch, out_channels, height, width), torch.channels_last)


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
    """See `kernels.native.run_codes`; `codes` are not empty."""
    assert library.products is not None
    image = image_of(codes, spec)
    if gate is not None and (gate.dtype is not torch.float32 or gate.stride(1) != 1):
        gate = gate.to(torch.float32).contiguous()
    if added is not None:
        added = added.contiguous(memory_format=image.memory_format)
    if added is not None and overwrite and added.dtype is dtype:
        result = added
    else:
        result = torch.empty(
            image.shape, dtype=dtype, device="cpu", memory_format=image.memory_format
        )
    status = library.products(
        image.structure,
        weight.structure,
        grid_structure(grid),
        _RESULT(
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
    """See `kernels.native.run_to_codes`; `codes` are not empty."""
    assert library.products is not None and spec.kind == "linear"
    image = image_of(codes, spec)
    shape = (*image.shape[:-1], image.shape[-1] // 2) if gated else image.shape
    result = torch.empty(shape, dtype=torch.uint8, device="cpu")
    place = _ENCODED(result.data_ptr(), ACTIVATION_CODES[activation], gated)
    status = library.products(
        image.structure,
        weight.structure,
        grid_structure(grid),
        None,
        place + grid_structure(output_grid),
        torch.get_num_threads(),
    )
    if status:
        fail(status)
    return result


def _is_bf16(x: Tensor | None) -> bool:
    return x is not None and x.dtype is torch.bfloat16
