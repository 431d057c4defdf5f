"""Conversion of the trainable simulation to packed layers.

The weights of each out-channel become codes, packed at the channel's own bits. Zero points become
uint8 codes. Scales and biases are copied.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from stepquant.models.non_finite import NonFiniteSamples
from stepquant.models.surgery import replace_modules
from stepquant.numerics import WEIGHT_ZERO_POINT_8BIT, max_code, max_codes, pack_channels
from stepquant.quantizers import (
    ActivationQuantizer,
    QuantAttention,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    WeightQuantizer,
)
from stepquant.runtime.blocks import use_fast_blocks
from stepquant.runtime.layers.integer import IntegerConv2d, IntegerLayer, IntegerLinear
from stepquant.runtime.layers.integer_attention import PackedAttention
from stepquant.runtime.ops.layer_spec import MOST_BITS_WITH_HALVES, LayerSpec
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter


def layer_spec(layer: QuantLayer) -> LayerSpec:
    """The description of a simulated layer that kernels need: shape, bits, kind of zero points."""
    bits = layer.channel_bits
    levels, channels = bits.unique(return_counts=True)
    spec = LayerSpec(
        "linear",
        layer.in_channels,
        layer.out_channels,
        int(levels.max()),
        layer.activation_bits,
        channel_counts=tuple(zip(levels.tolist(), channels.tolist(), strict=True))
        if len(levels) > 1
        else None,
        half_zero_points=any(
            bool((weights.zero_point != weights.zero_point.round()).any())
            for _, weights, _ in layer.parts()
        ),
    )
    if isinstance(layer, QuantLinear):
        return spec
    assert isinstance(layer, QuantConv2d)
    height, width = layer.weight.shape[2:]
    return replace(
        spec,
        kind="conv2d",
        kernel_size=(height, width),
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
    )


@torch.no_grad()
def pack_layer(layer: QuantLayer) -> IntegerLayer:
    """A packed layer with the codes, scales and step tables of `layer`.

    Raises:
        StepQuantError: A zero point is off its grid, or out-channels with half zero points have too
            many bits.
    """
    spec = layer_spec(layer)
    kind = IntegerLinear if spec.kind == "linear" else IntegerConv2d
    steps = max(inputs.steps for inputs, _, _ in layer.parts())
    optional = layer.optional_tensors()
    packed = kind(spec, layer.splits, steps, layer.context, optional)
    packed.bypass = layer.bypass
    streams = []
    for index, (inputs, weights, weight) in enumerate(layer.parts()):
        codes = weights.codes(weight).flatten(1)
        streams.append(pack_channels(codes, layer.channel_bits))
        packed.weight_scale[index] = weights.scale
        packed.weight_zero_point[index] = weight_zero_codes(weights, spec.half_zero_points)
        packed.act_scale[index] = inputs.scale
        packed.act_zero_point[index] = activation_zero_codes(inputs)
    packed.weight_packed.copy_(torch.cat(streams))
    if packed.channel_bits is not None:
        packed.channel_bits.copy_(layer.channel_bits)
    for name, tensor in optional.items():
        packed.get_buffer(name).copy_(tensor)
    return packed


@torch.no_grad()
def pack_attention(attention: QuantAttention) -> PackedAttention:
    """Packed attention products with the step tables of `attention`.

    Raises:
        StepQuantError: A zero point is off its grid.
    """
    probabilities = attention.probabilities
    packed = PackedAttention(
        attention.bits, probabilities.bits, probabilities.steps, attention.context
    )
    for index, quantizer in enumerate(attention.activation_quantizers):
        assert isinstance(quantizer, ActivationQuantizer)
        packed.act_scale[index] = quantizer.scale
        packed.act_zero_point[index] = activation_zero_codes(quantizer)
    packed.probability_scale.copy_(probabilities.scale)
    packed.probability_log2.copy_(probabilities.log2)
    return packed


def activation_zero_codes(quantizer: ActivationQuantizer) -> Tensor:
    """Zero points of an activation quantizer, rounded to uint8 codes `[T]`.

    Raises:
        StepQuantError: One of them is off the grid.
    """
    codes, largest = torch.round(quantizer.zero_point), max_code(quantizer.bits)
    if not bool(((codes >= 0) & (codes <= largest)).all()):
        raise _off_grid("activation", codes, f"0..{largest} for {quantizer.bits} bits")
    return codes.to(torch.uint8)


def weight_zero_codes(quantizer: WeightQuantizer, halves: bool) -> Tensor:
    """Zero points of a weight quantizer, uint8 `[C_out]`; counted in half steps if `halves`.

    8-bit weights are symmetric: their zero point is 128.

    Raises:
        StepQuantError: One of them is off the grid, or `halves` and an out-channel has more than
            `MOST_BITS_WITH_HALVES` bits.
    """
    zero_point, bits = quantizer.zero_point, quantizer.channel_bits
    symmetric = bits == 8
    low = torch.where(symmetric, WEIGHT_ZERO_POINT_8BIT, 0)
    high = torch.where(symmetric, WEIGHT_ZERO_POINT_8BIT, max_codes(bits))
    if halves and bool((bits > MOST_BITS_WITH_HALVES).any()):
        wide = zero_point[bits > MOST_BITS_WITH_HALVES]
        raise StepQuantError(
            f"a layer with half zero points has out-channels of {int(bits.max())} bits, with zero "
            f"points of {float(wide.min())} to {float(wide.max())}: expected at most "
            f"{MOST_BITS_WITH_HALVES} bits, so that differences in half steps fit in int8"
        )
    if not bool(((zero_point >= low) & (zero_point <= high)).all()):
        if len(bits.unique()) > 1:
            expected = f"0..2^bits - 1 for {int(bits.min())} to {int(bits.max())} bits"
        else:
            expected = f"{int(low[0])}..{int(high[0])} for {int(bits[0])} bits"
        raise _off_grid("weight", zero_point, expected)
    codes = 2 * zero_point if halves else zero_point
    return torch.round(codes).to(torch.uint8)


def _off_grid(what: str, found: Tensor, expected: str) -> StepQuantError:
    """The error for zero points off the grid."""
    return StepQuantError(
        f"{what} zero points lie in {float(found.min()):g}..{float(found.max()):g}: expected "
        f"{expected}"
    )


def pack_model(model: nn.Module, reporter: Reporter | None = None) -> nn.Module:
    """Replace every simulated layer and attention of `model` by its packed one, in place.

    From then on, blocks hand codes to their layers where they can. `reporter` shows progress.

    Raises:
        StepQuantError: See `pack_layer`.
    """
    reporter = reporter or Reporter(quiet=True)
    count = sum(isinstance(module, QuantAttention | QuantLayer) for module in model.modules())
    with reporter.task("packing layers", total=count) as task:

        def packed(name: str, module: nn.Module) -> nn.Module | None:
            found: nn.Module
            if isinstance(module, QuantAttention):
                found = pack_attention(module)
            elif isinstance(module, QuantLayer):
                found = pack_layer(module)
            else:
                return None
            task.advance(note=name)
            return found

        replace_modules(model, packed)
    if model._forward_pre_hooks:  # a denoiser, which its step context is attached to
        NonFiniteSamples.attach(model)
    return use_fast_blocks(model)
