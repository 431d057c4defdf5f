"""What packed layers keep of their weights in memory between calls.

In the mode "fast", the default, that is the weight in its kernel's layout, of 8 bits or, where the
native kernel can, of 4: the packed bytes are made again where somebody asks for them
(`runtime.layers.released`). In the mode "low" it is the packed
bytes, and each call lays the weight out, input part by input part, and drops it.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from stepquant.runtime.layers.differences import packed_of
from stepquant.runtime.layers.prepared import PreparedPart
from stepquant.runtime.layers.released import Released, whole
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:
    from stepquant.runtime.layers.integer import PackedLayer

MODES = ("fast", "low")
FLOAT = 4  # bytes


def packed_bytes(layer: PackedLayer) -> Tensor:
    """The packed weight of `layer`, uint8 `[bytes]`: its buffer, or the bytes made again."""
    return whole(layer.weight_packed)


def restore(layer: PackedLayer) -> None:
    """Let `layer` hold its packed bytes, and nothing that was made from them."""
    layer.weight_packed = packed_bytes(layer)
    layer._prepared = None


def release(layer: PackedLayer, parts: list[PreparedPart]) -> None:
    """Keep no packed bytes beside `parts`, the weight of `layer` as it was just laid out.

    They are kept on other devices than the CPU, where accelerate moves the layer's tensors itself,
    and where the layout would not give back the same bytes (bits of the last byte that no code
    takes, say).
    """
    packed = layer.weight_packed
    if packed.device.type != "cpu" or hasattr(layer, "_hf_hook"):
        return
    bits = None if layer.channel_bits is None else layer.channel_bits.clone()
    restored = functools.partial(_pack_again, parts, layer.weight_zero_point.clone(), bits)
    if torch.equal(restored(), packed):
        layer.weight_packed = Released(packed.numel(), restored)


def _pack_again(
    parts: list[PreparedPart], zero_points: Tensor, channel_bits: Tensor | None
) -> Tensor:
    streams = []
    for part, zero_point in zip(parts, zero_points, strict=True):
        assert part.weight is not None
        differences = part.kernel.differences(part.weight, part.spec)
        streams.append(packed_of(differences, zero_point, channel_bits, part.spec))
    return torch.cat(streams)


def state_of(layer: PackedLayer, part: PreparedPart) -> tuple[Tensor, ...]:
    """What the kernel of `part` runs on; in the mode "low" the caller holds the only copy."""
    weight = part.weight if part.weight is not None else _lay_out(layer, part)
    return (weight, *part.rest)


@torch.compiler.disable
def _lay_out(layer: PackedLayer, part: PreparedPart) -> Tensor:
    scale = layer.difference_scales()[part.index]
    return part.kernel.lay_out(layer.part_differences(part.index), scale, part.spec)


def set_memory_mode(model: nn.Module, mode: str) -> None:
    """What the packed layers of `model` keep of their weights: "fast" or "low".

    "fast", the default: weights in the layout of the CPU's kernels, a quarter of float32, or an
    eighth where the native kernel runs and they have 4 bits or less. They are laid out at the first
    call after this one. "low": the packed bytes, an eighth of float32 at
    4 bits, which each call lays out anew. The numbers that a model gives are the same.

    Raises StepQuantError for another mode, and if `model` has no packed layer.
    """
    if mode not in MODES:
        raise StepQuantError(f"unknown memory mode '{mode}': expected {' or '.join(MODES)}")
    layers = _layers(model)
    if not layers:
        raise StepQuantError(
            f"{type(model).__name__} has no packed layer: expected a denoiser that stepquant "
            "quantize packed, because only its layers have memory modes"
        )
    for layer in layers:
        restore(layer)
        layer.memory = mode


class WeightBytes(NamedTuple):
    """What the weights of quantized layers take in memory, in bytes."""

    resident: int
    """Of all tensors held for them: packed, laid out, scales, zero points, sums."""
    float32: int
    """Of the same weights in float32."""

    @property
    def times_smaller(self) -> float:
        """`float32 / resident`."""
        return self.float32 / self.resident


def weight_bytes_resident(model: nn.Module) -> WeightBytes:
    """What the weights of the quantized layers of `model` take in memory now, without a bias.

    Before the first call nothing is laid out.
    """
    resident = float32 = 0
    for other in model.modules():
        if isinstance(other, WeightOnly):
            float32 += FLOAT * math.prod(other.weight_shape)
            resident += sum(_size(tensor) for tensor in other.held())
    for layer in _layers(model):
        float32 += FLOAT * layer.spec.out_channels * layer.spec.columns
        buffers = [layer.weight_packed, layer.weight_scale, layer.weight_zero_point]
        buffers += [] if layer.channel_bits is None else [layer.channel_bits]
        held = [buffer for buffer in buffers if not isinstance(buffer, Released)]
        own = {buffer.untyped_storage().data_ptr() for buffer in held}
        for part in layer._prepared or []:
            held += [] if part.weight is None else [part.weight]
            # A kernel may take a row of a buffer as it is.
            held += [each for each in part.rest if each.untyped_storage().data_ptr() not in own]
        resident += sum(_size(tensor) for tensor in held)
    return WeightBytes(resident, float32)


def _size(tensor: Tensor) -> int:
    if tensor.is_mkldnn and hasattr(torch.ops.mkldnn, "_nbytes"):
        return int(torch.ops.mkldnn._nbytes(tensor))  # channels are padded to whole blocks
    return tensor.numel() * tensor.element_size()


def _layers(model: nn.Module) -> list[PackedLayer]:
    from stepquant.runtime.layers.integer import PackedLayer  # which imports this module

    return [module for module in model.modules() if isinstance(module, PackedLayer)]
