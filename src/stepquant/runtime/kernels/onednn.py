"""oneDNN's u8 x s8 kernels, which torch ships for x86 CPUs.

The weight is laid out for the kernel once; activation scale and zero point are arguments of each
call, so a step table costs nothing. The calls are wrapped as operators of our own, which
`torch.compile` treats as one opaque node.

A conv kernel that is told of a zero point sums up its whole weight anew in each call, which costs
up to twice the conv itself where images are small. So convs never tell it: the zero point's share,
`zero_point * sum(weight)`, is taken off the bias, and the codes are padded with the zero point.

On a CPU without VNNI (or with oneDNN capped to such an instruction set) the kernels add pairs of
products in int16 and saturate at full-range codes. There the codes are run as two exact halves,
`2 * (codes >> 1) + (codes & 1)`: twice the work, the same numbers.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.result_shapes import empty_result, planned_result


@dataclass(frozen=True)
class CallConstants:
    """What a kernel call needs beside codes and weight, where it is the same at every step.

    `scale`, `zero_point`: of the activation grid. `bias`: float32 `[C_out]`; a conv's holds the
    share of the zero point, see the module docstring.
    """

    scale: float
    zero_point: int
    bias: Tensor


def why_not(spec: LayerSpec, device: torch.device) -> str | None:
    """The reason why this kernel cannot take the layer on `device`, or None."""
    del spec
    if device.type != "cpu":
        return f"made for the CPU, the layer is on {device.type}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"made for x86-64, the machine is {platform.machine()}"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    return None


@torch.compiler.assume_constant_result  # torch.compile cannot trace the prepacking below
def pairs_saturate() -> bool:
    """Whether this machine's kernels saturate sums of two products at int16 (no VNNI)."""
    return _pairs_saturate()


@functools.cache
def _pairs_saturate() -> bool:
    # Whatever the default dtype and device are: the answer is kept.
    codes = torch.full((1, 64), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    ones = torch.ones(16, dtype=torch.float32, device="cpu")
    zeros = torch.zeros(16, dtype=torch.int32, device="cpu")
    y = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y != 64 * 255 * 127).any())


def prepare(weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
    """`(weight in the kernel's layout, weight_scale, weight zero points: all 0, weight sums)`.

    The sums `[C_out]` float32 are those of the weight that the codes stand for.
    """
    zeros = torch.zeros(spec.out_channels, dtype=torch.int32, device=weight.device)
    sums = weight.flatten(1).sum(dim=1).to(torch.float32) * weight_scale
    return lay_out(weight, weight_scale, spec), weight_scale, zeros, sums


def lay_out(weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
    """See the package docstring; an opaque tensor of oneDNN."""
    weight = weight.contiguous()
    if spec.kind == "linear":
        return torch.ops.onednn.qlinear_prepack(weight, None)
    return torch.ops.onednn.qconv_prepack(
        weight, weight_scale, 1.0, 0, spec.stride, [0, 0], spec.dilation, 1, None
    )


def differences(laid_out: Tensor, spec: LayerSpec) -> Tensor:
    """See the package docstring."""
    dense = laid_out.to_dense()
    return dense.t() if spec.kind == "linear" else dense


def run(
    state: tuple[Tensor, ...],
    codes: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bias: Tensor | None,
    accumulate: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    """See the package docstring."""
    if spec.pair_overflows_int16 and pairs_saturate():
        high = _call(state, codes >> 1, act_scale * 2, act_zero_point >> 1, None, accumulate, spec)
        return _call(state, codes & 1, act_scale, act_zero_point & 1, bias, high, spec)
    return _call(state, codes, act_scale, act_zero_point, bias, accumulate, spec)


def _call(
    state: tuple[Tensor, ...],
    codes: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bias: Tensor | None,
    accumulate: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    packed, weight_scale, zeros, sums = state
    if spec.kind == "linear":
        y = torch.ops.stepquant.linear_u8s8(
            codes.reshape(-1, spec.in_channels),
            act_scale,
            act_zero_point,
            packed,
            weight_scale,
            zeros,
            bias,
        )
        y = y.view(*codes.shape[:-1], spec.out_channels)
    else:
        share = act_scale * act_zero_point * sums  # [C_out]
        y = torch.ops.stepquant.conv2d_u8s8(
            codes,
            act_scale,
            act_zero_point,
            packed,
            weight_scale,
            zeros,
            -share if bias is None else bias - share,
            spec.kernel_size,
            spec.stride,
            spec.padding,
            spec.dilation,
        )
    return y if accumulate is None else y.add_(accumulate)


def run_codes(
    state: tuple[Tensor, ...],
    codes: Tensor,
    constants: CallConstants,
    spec: LayerSpec,
    added: Tensor | None,
    overwrite: bool,
    dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """As `kernels.native.run_codes`, with `constants` in the place of grid and biases.

    The bias of a conv holds the zero point's share.
    """
    packed, weight_scale, zeros, _ = state
    own = dtype if added is None and gate is None else torch.float32
    if not codes.numel():  # oneDNN gives [0, C_out] for every shape
        return empty_result(codes, spec, dtype)
    if spec.pair_overflows_int16 and pairs_saturate():
        raise AssertionError(
            f"one pass of oneDNN's kernel saturates w{spec.weight_bits}a{spec.activation_bits} "
            "without VNNI: callers ask `runtime.codes.why_not` first"
        )
    if spec.kind == "linear":
        y = torch.ops.onednn.qlinear_pointwise.default(
            *(codes, constants.scale, constants.zero_point, packed, weight_scale, zeros),
            *(constants.bias, 1.0, 0, own, "none", (), ""),
        )
    elif added is not None and gate is None and overwrite and added.dtype == dtype == torch.float32:
        return torch.ops.onednn.qconv2d_pointwise.binary(
            *(codes, constants.scale, 0, packed, weight_scale, zeros, added, constants.bias),
            *(spec.stride, (0, 0), spec.dilation, 1, 1.0, 0, dtype, 1.0, 0, "sum", 1.0),
            *("none", (), ""),
        )
    else:
        y = torch.ops.onednn.qconv2d_pointwise.default(
            *(codes, constants.scale, 0, packed, weight_scale, zeros, constants.bias),
            *(spec.stride, (0, 0), spec.dilation, 1, 1.0, 0),
            *(own, "none", (), ""),
        )
    if gate is not None:
        y = y.mul_(_beside(gate, y, spec))
    return y.to(dtype) if added is None else y.add_(added).to(dtype)


def run_codes_traced(
    state: tuple[Tensor, ...],
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor,
    spec: LayerSpec,
    added: Tensor | None,
    dtype: torch.dtype,
    gate: Tensor | None,
) -> Tensor:
    """`run_codes` in a graph, whose scale and zero point are tensors `[1]`, not numbers."""
    packed, weight_scale, zeros, _ = state
    arguments = (scale, zero_point.to(torch.int32), packed, weight_scale, zeros, bias)
    if spec.kind == "linear":
        y = torch.ops.stepquant.linear_u8s8(codes.reshape(-1, spec.in_channels), *arguments)
        y = y.view(*codes.shape[:-1], spec.out_channels)
    else:  # the codes have their frame already
        geometry = (spec.kernel_size, spec.stride, (0, 0), spec.dilation)
        y = torch.ops.stepquant.conv2d_u8s8(codes, *arguments, *geometry)
    if gate is not None:
        y = y * _beside(gate, y, spec)
    return y.to(dtype) if added is None else (y + added).to(dtype)


def _beside(gate: Tensor, y: Tensor, spec: LayerSpec) -> Tensor:
    """`gate [B, C_out]` in a shape that broadcasts over the layer's result `y`."""
    if spec.kind == "conv2d":
        return gate[:, :, None, None]
    return gate.view(gate.shape[0], *(1,) * (y.dim() - 2), -1)


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


# The prepacked weight lives on oneDNN's own backend, hence "CompositeExplicitAutograd".
_library.impl("linear_u8s8", _linear, "CompositeExplicitAutograd")
_library.impl("conv2d_u8s8", _conv2d, "CompositeExplicitAutograd")
torch.library.register_fake("stepquant::linear_u8s8", _linear_shape, lib=_library)
torch.library.register_fake("stepquant::conv2d_u8s8", _conv2d_shape, lib=_library)
