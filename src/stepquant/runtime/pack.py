"""From the trainable simulation to packed layers."""

from __future__ import annotations

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
    common = {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "weight_bits": layer.weight_bits,
        "activation_bits": layer.activation_bits,
    }
    if isinstance(layer, QuantLinear):
        return LayerSpec("linear", **common)
    assert isinstance(layer, QuantConv2d)
    return LayerSpec(
        "conv2d", **common, kernel_size=tuple(layer.weight.shape[2:]), stride=layer.stride,
        padding=layer.padding, dilation=layer.dilation,
    )


@torch.no_grad()
def pack_layer(layer: QuantLayer) -> PackedLayer:
    """The packed layer with the codes, scales and tables of `layer`."""
    spec = layer_spec(layer)
    kind = PackedLinear if spec.kind == "linear" else PackedConv2d
    steps = max(quantizer.steps for quantizer in layer.activation_quantizers)
    packed = kind(
        spec, layer.splits, steps, layer.context, layer.bias is not None, layer.scales_input
    )
    streams = []
    for index, weight in enumerate(layer.weight_parts()):
        weights, inputs = layer.weight_quantizers[index], layer.activation_quantizers[index]
        streams.append(pack_bits(weights.codes(weight), spec.weight_bits))
        packed.weight_scale[index] = weights.scale
        packed.weight_zero_point[index] = zero_codes(
            weights.zero_point, weights.bits, "weight", weights.bits == 8
        )
        packed.act_scale[index] = inputs.scale
        packed.act_zero_point[index] = zero_codes(inputs.zero_point, inputs.bits, "activation")
    packed.weight_packed.copy_(torch.cat(streams))
    if layer.bias is not None:
        packed.bias.copy_(layer.bias)
    if layer.scales_input:
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
