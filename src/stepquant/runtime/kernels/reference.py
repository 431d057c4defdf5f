"""The reference kernel: torch operations in float64, where integer sums below 2^53 are exact."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.kernels.kernel import Kernel, State
from stepquant.runtime.kernels.registry import kernel_of, register_kernel
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.refusal import Refusal


@register_kernel(priority=0)
class ReferenceKernel(Kernel):
    """Runs every layer on every device with float64; its layout is the unchanged weight."""

    name = Backend.REFERENCE.value

    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        """None, because this kernel runs every layer."""
        del spec, device
        return None

    def prepare(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> State:
        """`(weight, weight_scale)`."""
        return self.lay_out(weight, weight_scale, spec), weight_scale

    def lay_out(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
        """The int8 differences, unchanged."""
        del weight_scale, spec
        return weight

    def differences(self, laid_out: Tensor, spec: LayerSpec) -> Tensor:
        """The int8 differences, unchanged."""
        del spec
        return laid_out

    def run(
        self,
        state: State,
        codes: Tensor,
        act_scale: Tensor,
        act_zero_point: Tensor,
        bias: Tensor | None,
        accumulate: Tensor | None,
        spec: LayerSpec,
    ) -> Tensor:
        """See `kernels.kernel`."""
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


REFERENCE = kernel_of(ReferenceKernel)
