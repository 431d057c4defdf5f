"""What comes of codes, before a kernel writes there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError


class Shape(NamedTuple):
    """Of a layer's result."""

    sizes: tuple[int, ...]
    memory_format: torch.memory_format


def check_channels(codes: Tensor, spec: LayerSpec) -> None:
    """Raise StepQuantError for codes of another number of channels than the layer's."""
    channels = codes.shape[-1 if spec.kind == "linear" else 1]
    if channels != spec.in_channels:
        raise StepQuantError(
            f"a layer's input has {channels} channels: expected {spec.in_channels}, in an input of "
            f"{tuple(codes.shape)}"
        )


def shape_of(codes: Tensor, spec: LayerSpec) -> Shape:
    """What comes of `codes`: `[B, C, H + 2 ph, W + 2 pw]`, or `[..., C]` of a linear layer.

    Raises StepQuantError for codes of another number of channels, and for an image that is smaller
    than the kernel.
    """
    check_channels(codes, spec)
    if spec.kind == "linear":
        return Shape((*codes.shape[:-1], spec.out_channels), torch.contiguous_format)
    height, width = spec.result_size(codes.shape[2], codes.shape[3])
    if height < 1 or width < 1:
        raise StepQuantError(
            f"an image of {codes.shape[2]} x {codes.shape[3]}, with its padding, is smaller than "
            f"the kernel of {spec.kernel_size[0]} x {spec.kernel_size[1]}: expected at least its "
            "size"
        )
    return Shape((codes.shape[0], spec.out_channels, height, width), torch.channels_last)


def empty_result(codes: Tensor, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    """The layer's result for no codes at all: it is empty, too."""
    sizes, memory_format = shape_of(codes, spec)
    return torch.empty(sizes, dtype=dtype, device=codes.device, memory_format=memory_format)


def planned_result(codes: Tensor, spec: LayerSpec) -> Tensor:
    """What `torch.compile` plans with, for an image without its padding: float32, not computed."""
    if spec.kind == "linear":
        return codes.new_empty((*codes.shape[:-1], spec.out_channels), dtype=torch.float32)
    padded = [codes.shape[2 + i] + 2 * spec.padding[i] for i in range(2)]
    sizes = (codes.shape[0], spec.out_channels, *spec.result_size(padded[0], padded[1]))
    return codes.new_empty(sizes, dtype=torch.float32).to(memory_format=torch.channels_last)
