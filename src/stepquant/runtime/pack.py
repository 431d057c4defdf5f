"""From the trainable simulation to packed layers."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from stepquant.errors import StepQuantError
from stepquant.models.surgery import replace_modules
from stepquant.numerics import WEIGHT_ZERO_POINT_8BIT, max_code, pack_bits
from stepquant.quantizers import QuantConv2d, QuantLayer, QuantLinear
from stepquant.runtime.packed import PackedConv2d, PackedLayer, PackedLinear
from stepquant.runtime.spec import LayerSpec


def layer_spec(layer: QuantLayer) -> LayerSpec:
    """The kernel-side description of a simulated layer."""
    spec = LayerSpec(
        "linear", layer.in_channels, layer.out_channels, layer.weight_bits, layer.activation_bits
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
def pack_layer(layer: QuantLayer) -> PackedLayer:
    """The packed layer with the codes, scales and tables of `layer`."""
    spec = layer_spec(layer)
    kind = PackedLinear if spec.kind == "linear" else PackedConv2d
    steps = max(inputs.steps for inputs, _, _ in layer.parts())
    packed = kind(
        spec, layer.splits, steps, layer.context, layer.bias is not None, layer.scales_input
    )
    streams = []
    for index, (inputs, weights, weight) in enumerate(layer.parts()):
        streams.append(pack_bits(weights.codes(weight), spec.weight_bits))
        packed.weight_scale[index] = weights.scale
        packed.weight_zero_point[index] = zero_codes(
            weights.zero_point, weights.bits, "weight", weights.bits == 8
        )
        packed.act_scale[index] = inputs.scale
        packed.act_zero_point[index] = zero_codes(inputs.zero_point, inputs.bits, "activation")
    packed.weight_packed.copy_(torch.cat(streams))
    if layer.bias is not None:
        assert packed.bias is not None
        packed.bias.copy_(layer.bias)
    if layer.scales_input:
        assert packed.act_channel_scale is not None
        packed.act_channel_scale.copy_(1.0 / layer.inverse_channel_scale)
    return packed


def zero_codes(zero_point: Tensor, bits: int, what: str, symmetric: bool = False) -> Tensor:
    """`zero_point` rounded to uint8 codes; an error that names `what` where it is off the grid."""
    codes = torch.round(zero_point)
    low, high = (WEIGHT_ZERO_POINT_8BIT,) * 2 if symmetric else (0, max_code(bits))
    if not bool(((codes >= low) & (codes <= high)).all()):
        raise StepQuantError(
            f"{what} zero points lie in {float(codes.min()):g}..{float(codes.max()):g}: expected "
            f"{low}..{high} for {bits} bits"
        )
    return codes.to(torch.uint8)


def pack_model(model: nn.Module) -> nn.Module:
    """Replace every simulated layer of `model` by its packed one, in place."""
    return replace_modules(
        model, lambda _, module: pack_layer(module) if isinstance(module, QuantLayer) else None
    )
