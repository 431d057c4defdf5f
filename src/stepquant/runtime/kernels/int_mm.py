"""CUDA kernel: int8 matrix product with int32 sums (`torch._int_mm`), with im2col for convs.

It also runs on the CPU, so that tests do not need a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.kernels.kernel import Kernel, State
from stepquant.runtime.kernels.registry import kernel_of, register_kernel
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.refusal import Refusal, RefusalCode

SHIFT = 128  # shifts codes from 0..255 into int8
LEAST_ROWS = 32  # cuBLAS needs more than 16 rows


@register_kernel(priority=100)
class IntMmKernel(Kernel):
    """`torch._int_mm`: int8 times int8 with int32 sums. The layout is `[K, C_out]`."""

    name = Backend.INT_MM.value
    device_types = ("cuda",)

    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        """Why this kernel cannot run the layer on `device`, or None."""
        if device.type != "cuda":
            return Refusal(RefusalCode.DEVICE, f"needs CUDA, but the layer is on {device.type}")
        if spec.columns % 8 or spec.out_channels % 8:
            return Refusal(
                RefusalCode.SHAPE,
                "needs matrix sizes that are multiples of 8, got "
                f"{spec.columns} and {spec.out_channels}",
            )
        if spec.dilation != (1, 1):
            return Refusal(RefusalCode.SHAPE, f"needs a dilation of 1, got {spec.dilation}")
        return None

    def prepare(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> State:
        """`(weight [K, C_out] int8, column sums [C_out] int32, weight_scale)`."""
        sums = weight.flatten(1).sum(dim=1, dtype=torch.int32)
        return self.lay_out(weight, weight_scale, spec), sums, weight_scale

    def lay_out(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
        """See `kernels.kernel`."""
        del weight_scale, spec
        return weight.reshape(weight.shape[0], -1).t()

    def differences(self, laid_out: Tensor, spec: LayerSpec) -> Tensor:
        """See `kernels.kernel`."""
        return laid_out.t().reshape(spec.weight_shape)

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
        matrix, sums, weight_scale = state
        signed = codes.to(torch.int16).sub_(SHIFT).to(torch.int8)
        shape: tuple[int, ...]
        if spec.kind == "linear":
            shape = codes.shape[:-1]
            rows = signed.reshape(-1, spec.in_channels)
        else:
            rows, shape = _im2col(signed, (act_zero_point - SHIFT).to(torch.int8), spec)
        count = rows.shape[0]
        if count < LEAST_ROWS:
            rows = functional.pad(rows, (0, 0, 0, LEAST_ROWS - count))
        total = torch._int_mm(rows.contiguous(), matrix)[:count]
        total = total + (SHIFT - act_zero_point) * sums
        y = total.to(torch.float32) * (act_scale * weight_scale)
        if bias is not None:
            y = y + bias
        y = y.view(*shape, spec.out_channels)
        if spec.kind == "conv2d":
            y = y.permute(0, 3, 1, 2)  # channels-last memory
        return y if accumulate is None else y + accumulate


INT_MM = kernel_of(IntMmKernel)


def _im2col(signed: Tensor, fill: Tensor, spec: LayerSpec) -> tuple[Tensor, tuple[int, int, int]]:
    """The patches of `signed [B, C, H, W]` as rows, and the result's `(B, H_out, W_out)`.

    The rows are `[B * H_out * W_out, C * kh * kw]`. `fill [1]` is the padding value; it stays a
    tensor, because reading it would synchronize with the device in every layer.
    """
    (ph, pw), (kh, kw), (sh, sw) = spec.padding, spec.kernel_size, spec.stride
    batch, channels, height, width = signed.shape
    padded = fill.repeat(batch, channels, height + 2 * ph, width + 2 * pw)
    padded[:, :, ph : ph + height, pw : pw + width] = signed
    patches = padded.unfold(2, kh, sh).unfold(3, kw, sw)  # [B, C, H_out, W_out, kh, kw]
    batch, channels, height, width = patches.shape[:4]
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(batch * height * width, channels * kh * kw)
    return rows, (batch, height, width)
