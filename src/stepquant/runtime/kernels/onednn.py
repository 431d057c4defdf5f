"""oneDNN's u8 x s8 kernels, which torch ships for x86 CPUs.

The weight is laid out for the kernel once. Activation scale and zero point are arguments of each
call, so step tables have no cost.

A conv kernel that gets a zero point sums up its whole weight in each call, which takes up to twice
as long as the conv itself on small images. So conv calls pass the zero point 0: the bias includes
the zero point's share, `-zero_point * sum(weight)`, and the codes are padded with the zero point.

On CPUs without VNNI (or with oneDNN capped to such an instruction set), the kernels add pairs of
products in int16 and saturate at full-range codes. There the codes run as two exact halves,
`2 * (codes >> 1) + (codes & 1)`: twice the work, the same values.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

import stepquant.runtime.kernels.onednn_operators  # noqa: F401  # torch.ops.stepquant has them
from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.kernels.kernel import BoundWeight, State, TakesCodes
from stepquant.runtime.kernels.registry import kernel_of, register_kernel
from stepquant.runtime.ops import fused
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.result_shapes import empty_result
from stepquant.support.refusal import Refusal, RefusalCode

NO_VNNI = Refusal(RefusalCode.NO_VNNI, "no VNNI")


@torch.compiler.assume_constant_result  # torch.compile cannot trace the prepacking below
def pairs_saturate() -> bool:
    """Whether oneDNN's kernels on this machine saturate sums of two products at int16 (no VNNI)."""
    return _pairs_saturate()


@functools.cache
def _pairs_saturate() -> bool:
    # Explicit dtype and device, because the cached answer must not depend on torch's defaults.
    codes = torch.full((1, 64), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((16, 64), 127, dtype=torch.int8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    ones = torch.ones(16, dtype=torch.float32, device="cpu")
    zeros = torch.zeros(16, dtype=torch.int32, device="cpu")
    y = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((y != 64 * 255 * 127).any())


@register_kernel(priority=200)
class OneDnnKernel(TakesCodes):
    """oneDNN through torch; the layout is an opaque oneDNN tensor."""

    name = Backend.ONEDNN.value
    device_types = ("cpu",)

    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        """Why this kernel cannot run the layer on `device`, or None."""
        del spec
        if device.type != "cpu":
            return Refusal(RefusalCode.DEVICE, f"needs the CPU, but the layer is on {device.type}")
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return Refusal(
                RefusalCode.MACHINE, f"needs x86-64, but the machine is {platform.machine()}"
            )
        if not torch.backends.mkldnn.is_available():
            return Refusal(RefusalCode.MACHINE, "needs oneDNN, but torch was built without it")
        return None

    def why_no_codes(self, spec: LayerSpec) -> Refusal | None:
        """`NO_VNNI` if the layer's products would saturate, so that it needs two calls; or None."""
        return NO_VNNI if spec.pair_overflows_int16 and pairs_saturate() else None

    def prepare(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> State:
        """`(weight in the kernel's layout, weight_scale, zero points, sums)`.

        The zero points of the weight are int32 `[C_out]`, all 0. The sums over the dequantized
        weight are float32 `[C_out]`.
        """
        zeros = torch.zeros(spec.out_channels, dtype=torch.int32, device=weight.device)
        sums = weight.flatten(1).sum(dim=1).to(torch.float32) * weight_scale
        return self.lay_out(weight, weight_scale, spec), weight_scale, zeros, sums

    def lay_out(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
        """See `kernels.kernel`."""
        weight = weight.contiguous()
        if spec.kind == "linear":
            return torch.ops.onednn.qlinear_prepack(weight, None)
        return torch.ops.onednn.qconv_prepack(
            weight, weight_scale, 1.0, 0, spec.stride, [0, 0], spec.dilation, 1, None
        )

    def differences(self, laid_out: Tensor, spec: LayerSpec) -> Tensor:
        """See `kernels.kernel`."""
        dense = laid_out.to_dense()
        return dense.t() if spec.kind == "linear" else dense

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
        if spec.pair_overflows_int16 and pairs_saturate():
            high = one_call(
                state, codes >> 1, act_scale * 2, act_zero_point >> 1, None, accumulate, spec
            )
            return one_call(state, codes & 1, act_scale, act_zero_point & 1, bias, high, spec)
        return one_call(state, codes, act_scale, act_zero_point, bias, accumulate, spec)

    def bind(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> BoundWeight:
        """See `kernels.kernel`."""
        return OneDnnWeight(state, bias, step_bias, spec)


ONEDNN = kernel_of(OneDnnKernel)


def one_call(
    state: State,
    codes: Tensor,
    act_scale: Tensor,
    act_zero_point: Tensor,
    bias: Tensor | None,
    accumulate: Tensor | None,
    spec: LayerSpec,
) -> Tensor:
    """As `Kernel.run`, but without VNNI it saturates at full-range codes."""
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


@dataclass(frozen=True)
class CallConstants:
    """The arguments of a kernel call besides codes and weight.

    `scale`, `zero_point`: the activation grid. `bias`: float32 `[C_out]`; for convs it includes
    the zero point's share, see the module docstring.
    """

    scale: float
    zero_point: int
    bias: Tensor


class OneDnnWeight(BoundWeight):
    """Caches the constants of a call if all steps share them."""

    def __init__(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> None:
        self.state, self.bias, self.step_bias, self.spec = state, bias, step_bias, spec
        self._constants: CallConstants | None = None

    def is_current(self, bias: Tensor | None, step_bias: Tensor | None) -> bool:
        """Whether these are the bound biases."""
        return self.bias is bias and self.step_bias is step_bias

    def tensors(self) -> list[Tensor]:
        """The tensors that calls read."""
        constants = None if self._constants is None else self._constants.bias
        found = (*self.state, self.bias, self.step_bias, constants)
        return [each for each in found if each is not None]

    def constants(self, grid: Grid) -> CallConstants:
        """The call constants at the current step of `grid`."""
        if self._constants is not None:
            return self._constants
        scale, bias = self._epilogue(grid)
        found = CallConstants(float(scale), int(grid.in_force()[1]), bias)
        if grid.row is None and self.step_bias is None:
            self._constants = found
        return found

    def _epilogue(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Scale `[1]` and bias `[C_out]` at the current step of `grid`, both float32."""
        is_conv = self.spec.kind == "conv2d"
        return fused.epilogue(grid, self.state[3], self.bias, self.step_bias, is_conv)

    def run(
        self,
        codes: Tensor,
        grid: Grid,
        added: Tensor | None,
        overwrite: bool,
        dtype: torch.dtype,
        gate: Tensor | None,
    ) -> Tensor:
        """See `BoundWeight`."""
        if torch.compiler.is_compiling():
            scale, bias = self._epilogue(grid)
            zero_point = grid.in_force()[1]
            return run_codes_traced(
                self.state, codes, scale, zero_point, bias, self.spec, added, dtype, gate
            )
        constants = self._constants or self.constants(grid)
        return run_codes(self.state, codes, constants, self.spec, added, overwrite, dtype, gate)


def run_codes(
    state: State,
    codes: Tensor,
    constants: CallConstants,
    spec: LayerSpec,
    added: Tensor | None,
    overwrite: bool,
    dtype: torch.dtype,
    gate: Tensor | None = None,
) -> Tensor:
    """As `BoundWeight.run`, with `constants` instead of grid and biases.

    Raises AssertionError if the products would saturate: check `why_no_codes` first.
    """
    packed, weight_scale, zeros, _ = state
    own = dtype if added is None and gate is None else torch.float32
    if not codes.numel():  # oneDNN would return [0, C_out] for every shape
        return empty_result(codes, spec, dtype)
    if spec.pair_overflows_int16 and pairs_saturate():
        raise AssertionError(
            f"one pass of oneDNN's kernel saturates w{spec.weight_bits}a{spec.activation_bits} "
            "without VNNI: callers ask `why_no_codes` first"
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
    """`run_codes` for traced graphs, where scale and zero point are tensors `[1]`, not numbers."""
    packed, weight_scale, zeros, _ = state
    arguments = (scale, zero_point.to(torch.int32), packed, weight_scale, zeros, bias)
    if spec.kind == "linear":
        y = torch.ops.stepquant.linear_u8s8(codes.reshape(-1, spec.in_channels), *arguments)
        y = y.view(*codes.shape[:-1], spec.out_channels)
    else:  # the codes are already padded
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
