"""oneDNN's products as stepquant operators, which `torch.compile` treats as opaque nodes.

`stepquant::linear_u8s8` takes uint8 codes `[N, C]`; `stepquant::conv2d_u8s8` takes uint8 codes
`[B, C, H, W]` and pads them. Activation scale and zero point are tensors `[1]`, and results are
float32.
"""

from __future__ import annotations

import torch

from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.result_shapes import planned_result

_library = torch.library.Library("stepquant", "FRAGMENT")
_library.define(
    "linear_u8s8(Tensor codes, Tensor act_scale, Tensor act_zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor weight_zero_point, Tensor? bias) -> Tensor"
)
_library.define(
    "conv2d_u8s8(Tensor codes, Tensor act_scale, Tensor act_zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor weight_zero_point, Tensor bias, int[2] kernel_size,"
    " int[2] stride, int[2] padding, int[2] dilation) -> Tensor"
)


def _linear(codes, act_scale, act_zero_point, weight, weight_scale, weight_zero_point, bias):  # type: ignore[no-untyped-def]
    return torch.ops.onednn.qlinear_pointwise.tensor(
        codes,
        act_scale,
        act_zero_point,
        weight,
        weight_scale,
        weight_zero_point,
        bias,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )


def _conv2d(  # type: ignore[no-untyped-def]
    codes,
    act_scale,
    act_zero_point,
    weight,
    weight_scale,
    weight_zero_point,
    bias,
    kernel_size,
    stride,
    padding,
    dilation,
):
    del kernel_size
    return torch.ops.onednn.qconv2d_pointwise.tensor(
        pad(codes, act_zero_point, padding),
        act_scale,
        weight_zero_point[:1],  # zero
        weight,
        weight_scale,
        weight_zero_point,
        bias,
        stride,
        [0, 0],
        dilation,
        1,
        1.0,
        0,
        torch.float32,
        "none",
        [],
        "",
    )


def _linear_shape(codes, act_scale, act_zero_point, weight, weight_scale, weight_zero_point, bias):  # type: ignore[no-untyped-def]
    return codes.new_empty((codes.shape[0], weight_scale.shape[0]), dtype=torch.float32)


def _conv2d_shape(  # type: ignore[no-untyped-def]
    codes,
    act_scale,
    act_zero_point,
    weight,
    weight_scale,
    weight_zero_point,
    bias,
    kernel_size,
    stride,
    padding,
    dilation,
):
    spec = LayerSpec(
        *("conv2d", codes.shape[1], weight_scale.shape[0], 8, 8),
        *(tuple(each) for each in (kernel_size, stride, padding, dilation)),  # type: ignore[arg-type]
    )
    return planned_result(codes, spec)


# "CompositeExplicitAutograd", because the prepacked weight belongs to oneDNN's own backend.
_library.impl("linear_u8s8", _linear, "CompositeExplicitAutograd")
_library.impl("conv2d_u8s8", _conv2d, "CompositeExplicitAutograd")
torch.library.register_fake("stepquant::linear_u8s8", _linear_shape, lib=_library)
torch.library.register_fake("stepquant::conv2d_u8s8", _conv2d_shape, lib=_library)
