"""Output shapes of quantized layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError


class Shape(NamedTuple):
    """Shape and memory format of a layer's result."""

    sizes: tuple[int, ...]
    memory_format: torch.memory_format


def check_channels(codes: Tensor, spec: LayerSpec) -> None:
    """Raise StepQuantError if `codes` do not have the layer's number of in-channels."""
    channels = codes.shape[-1 if spec.kind == "linear" else 1]
    if channels != spec.in_channels:
        raise StepQuantError(
            f"a layer's input of {tuple(codes.shape)} has {channels} channels: expected "
            f"{spec.in_channels}"
        )


def shape_of(codes: Tensor, spec: LayerSpec) -> Shape:
    """The shape of a layer's result for `codes`.

    `codes`: `[B, C, H + 2 ph, W + 2 pw]`, or `[..., C]` for linear layers.

    Raises StepQuantError for a wrong number of channels, and for a padded image that is smaller
    than the kernel.
    """
    check_channels(codes, spec)
    if spec.kind == "linear":
        return Shape((*codes.shape[:-1], spec.out_channels), torch.contiguous_format)
    height, width = spec.result_size(codes.shape[2], codes.shape[3])
    if height < 1 or width < 1:
        raise StepQuantError(
            f"an image of {codes.shape[2]} x {codes.shape[3]}, with its padding, is smaller than "
            f"the kernel: expected at least {spec.kernel_size[0]} x {spec.kernel_size[1]}"
        )
    return Shape((codes.shape[0], spec.out_channels, height, width), torch.channels_last)


def empty_result(codes: Tensor, spec: LayerSpec, dtype: torch.dtype) -> Tensor:
    """The layer's result for empty `codes`: an empty tensor of `dtype`.

    Raises StepQuantError as `shape_of` does.
    """
    sizes, memory_format = shape_of(codes, spec)
    return torch.empty(sizes, dtype=dtype, device=codes.device, memory_format=memory_format)


def planned_result(codes: Tensor, spec: LayerSpec) -> Tensor:
    """An uninitialized float32 result, from which `torch.compile` plans.

    `codes`: `[B, C, H, W]`, not padded, or `[..., C]` for linear layers.
    """
    if spec.kind == "linear":
        return codes.new_empty((*codes.shape[:-1], spec.out_channels), dtype=torch.float32)
    padded = [codes.shape[2 + i] + 2 * spec.padding[i] for i in range(2)]
    sizes = (codes.shape[0], spec.out_channels, *spec.result_size(padded[0], padded[1]))
    return codes.new_empty(sizes, dtype=torch.float32).to(memory_format=torch.channels_last)
