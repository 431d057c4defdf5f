"""Gradients of quantized layers with respect to their input.

Rounding has a zero gradient almost everywhere. The straight-through estimator (Bengio et al. 2013,
arXiv 1308.3432) treats it as the identity instead. A layer's gradient is then that of the float
layer with the dequantized weight, and zero for inputs that the activation grid clips (LSQ, Esser
et al. 2020, equation 3). The simulation trains with the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_input

from stepquant.runtime.ops.layer_spec import LayerSpec

Gradient = Callable[[Tensor], Tensor]


def wants_gradient(*inputs: Tensor | None) -> bool:
    """Whether gradients are enabled and one of `inputs` requires one."""
    return torch.is_grad_enabled() and any(
        [each is not None and each.requires_grad for each in inputs]
    )


def straight_through(x: Tensor, compute: Callable[[Tensor], Tensor], gradient: Gradient) -> Tensor:
    """`compute(x)`, bit for bit, with a gradient of the caller's choice.

    `gradient` maps the gradient of the result to that of `x`. Autograd differentiates neither
    function.
    """
    return _StraightThrough.apply(x, compute, gradient)  # type: ignore[no-untyped-call,no-any-return]


def with_gradient_of(value: Tensor, carrier: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `carrier`, a tensor of the same shape."""
    return _WithGradientOf.apply(value, carrier)  # type: ignore[no-untyped-call,no-any-return]


def gradient_of_input(grad: Tensor, weight: Tensor, spec: LayerSpec, shape: torch.Size) -> Tensor:
    """The gradient of a float layer's input, computed from that of its result.

    Args:
        grad: The gradient of the result, float.
        weight: float32 `[C_out, C_in, ...]`.
        spec: Kind, stride, padding and dilation of the layer.
        shape: The shape of the input.

    Returns:
        float32 of `shape`.
    """
    grad = grad.to(torch.float32)
    if spec.kind == "linear":
        return functional.linear(grad, weight.t())
    return conv2d_input(shape, weight, grad, spec.stride, spec.padding, spec.dilation)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Any, gradient: Gradient) -> Any:
        ctx.gradient, ctx.dtype = gradient, x.dtype
        return compute(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.gradient(grad).to(ctx.dtype), None, None


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Any:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad
