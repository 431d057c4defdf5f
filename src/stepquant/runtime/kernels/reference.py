"""The judge: plain torch in float64, where integer sums below 2^53 are exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.ops.layer_spec import LayerSpec


def why_not(spec: LayerSpec, device: torch.device) -> str | None:
    """Takes every layer on every device that has float64."""
    del spec, device
    return None


def prepare(weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
    """`(weight, weight_scale)`."""
    return lay_out(weight, weight_scale, spec), weight_scale


def lay_out(weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
    """The int8 differences as they are."""
    del weight_scale, spec
    return weight


def differences(laid_out: Tensor, spec: LayerSpec) -> Tensor:
    """The int8 differences as they are."""
    del spec
    return laid_out


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
    weight, weight_scale = state
    difference = codes.to(torch.float64) - act_zero_point
    if spec.kind == "linear":
        total = functional.linear(difference, weight.to(torch.float64))
        y = total.to(torch.float32) * (act_scale * weight_scale)
        if bias is not None:
            y = y + bias
    else:
        total = functional.conv2d(
            difference, weight.to(torch.float64), None, spec.stride, spec.padding, spec.dilation
        )
        y = total.to(torch.float32) * (act_scale * weight_scale).view(1, -1, 1, 1)
        if bias is not None:
            y = y + bias.view(1, -1, 1, 1)
    return y if accumulate is None else y + accumulate
