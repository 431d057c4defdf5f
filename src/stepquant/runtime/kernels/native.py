"""Our own u8 x s8 products for x86 CPUs with AVX-512 VNNI or AMX (`runtime.ops.native`).

Compared with oneDNN's kernels through torch: calls set nothing up, and a denoiser makes a hundred
of them, most on small images; scale, zero point and bias are read from the step table in place; the
zero point's share is subtracted in integers; gate and residual are applied as the result is
written. The call is an operator, which `torch.compile` treats as one opaque node.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.kernels.kernel import BoundWeight, State, TakesCodes
from stepquant.runtime.kernels.registry import kernel_of, register_kernel
from stepquant.runtime.kernels.tiles import TILE, tiles_of, weight_in
from stepquant.runtime.ops import native
from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import products
from stepquant.runtime.ops.result_shapes import check_channels, empty_result, planned_result
from stepquant.support.refusal import Refusal, RefusalCode

MOST_COLUMNS = 1 << 16  # whose products, and the zero point's, an int32 holds


@register_kernel(priority=300)
class NativeKernel(TakesCodes):
    """Integer products in C++; `kernels.tiles` is their layout."""

    name = Backend.NATIVE.value
    device_types = ("cpu",)

    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        """Why this kernel cannot take the layer on `device`, or None."""
        if device.type != "cpu":
            return Refusal(RefusalCode.DEVICE, f"made for the CPU, the layer is on {device.type}")
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return Refusal(
                RefusalCode.MACHINE, f"made for x86-64, the machine is {platform.machine()}"
            )
        if spec.columns > MOST_COLUMNS:
            return Refusal(
                RefusalCode.SHAPE,
                f"holds sums of {MOST_COLUMNS} products, the layer has {spec.columns}",
            )
        return native.why_no_products()

    def prepare(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> State:
        """`(weight in tiles, weight_scale, weight sums [C_out] int32)`."""
        sums = weight.flatten(1).sum(dim=1, dtype=torch.int32)
        return self.lay_out(weight, weight_scale, spec), weight_scale.contiguous(), sums

    def lay_out(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
        """See `tiles.tiles_of`."""
        del weight_scale
        return tiles_of(weight, spec)

    def differences(self, laid_out: Tensor, spec: LayerSpec) -> Tensor:
        """See `kernels.kernel`."""
        return weight_in(laid_out, spec)

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
        check_channels(codes, spec)  # the operator takes their number from the codes
        return torch.ops.stepquant.native_u8s8(
            *(codes, act_scale, act_zero_point.to(torch.uint8), *state, bias, accumulate),
            *(spec.kind == "linear", spec.kernel_size, spec.stride, spec.padding, spec.dilation),
        )

    def bind(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> BoundWeight:
        """See `kernels.kernel`."""
        return NativeWeight(state, bias, step_bias, spec)


NATIVE = kernel_of(NativeKernel)


class NativeWeight(BoundWeight):
    """Keeps the C structure that says where weight and biases lie."""

    def __init__(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> None:
        tiles, scale, sums = state
        self.held, self.spec = products.weight_of(tiles, scale, sums, bias, step_bias), spec

    def is_current(self, bias: Tensor | None, step_bias: Tensor | None) -> bool:
        """Whether these biases are the bound ones, and all tensors lie where they lay."""
        held = self.held
        return held.bias is bias and held.step_bias is step_bias and held.in_place()

    def tensors(self) -> list[Tensor]:
        """The tensors that calls read."""
        held = self.held
        found = (held.tiles, held.scale, held.sums, held.bias, held.step_bias)
        return [each for each in found if each is not None]

    def run(
        self,
        codes: Tensor,
        grid: Grid,
        added: Tensor | None = None,
        overwrite: bool = False,
        dtype: torch.dtype = torch.float32,
        gate: Tensor | None = None,
    ) -> Tensor:
        """See `BoundWeight`."""
        if not codes.numel():
            return empty_result(codes, self.spec, dtype)
        library = native.library()
        assert library is not None
        return products.products(
            library, codes, grid, self.held, self.spec, added, overwrite, dtype, gate
        )

    def run_to_codes(
        self,
        codes: Tensor,
        grid: Grid,
        activation: str,
        gated: bool,
        output_grid: Grid,
        dtype: torch.dtype,
    ) -> Tensor:
        """See `BoundWeight`; a layer that fits in tiles is encoded as it is written."""
        if not fits_in_tiles(self.spec, gated):
            return super().run_to_codes(codes, grid, activation, gated, output_grid, dtype)
        if not codes.numel():
            y = empty_result(codes, self.spec, torch.uint8)
            return y[..., : self.spec.out_channels // 2] if gated else y
        library = native.library()
        assert library is not None
        return products.product_codes(
            library, codes, grid, self.held, self.spec, activation, gated, output_grid
        )


def fits_in_tiles(spec: LayerSpec, gated: bool) -> bool:
    """Whether the kernel can encode the layer's result as it writes it."""
    return spec.kind == "linear" and spec.out_channels % ((2 if gated else 1) * TILE) == 0


_library = torch.library.Library("stepquant", "FRAGMENT")
_library.define(
    "native_u8s8(Tensor codes, Tensor act_scale, Tensor act_zero_point, Tensor weight,"
    " Tensor weight_scale, Tensor weight_sums, Tensor? bias, Tensor? accumulate, bool linear,"
    " int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation) -> Tensor"
)


def _spec(codes, weight_scale, linear, kernel_size, stride, padding, dilation):  # type: ignore[no-untyped-def]
    kind, in_channels = ("linear", codes.shape[-1]) if linear else ("conv2d", codes.shape[1])
    sizes = [tuple(each) for each in (kernel_size, stride, padding, dilation)]
    return LayerSpec(kind, in_channels, weight_scale.shape[0], 8, 8, *sizes)  # type: ignore[arg-type]


def _native(codes, act_scale, act_zero_point, weight, weight_scale, sums, bias, added, *geometry):  # type: ignore[no-untyped-def]
    spec = _spec(codes, weight_scale, *geometry)
    if spec.kind == "conv2d":
        codes = pad(codes, act_zero_point, spec.padding)
    bound = NativeWeight((weight, weight_scale, sums), bias, None, spec)
    return bound.run(codes, Grid(act_scale, act_zero_point, None, 255), added)


def _shape(codes, act_scale, act_zero_point, weight, weight_scale, sums, bias, added, *geometry):  # type: ignore[no-untyped-def]
    return planned_result(codes, _spec(codes, weight_scale, *geometry))


_library.impl("native_u8s8", _native, "CPU")
torch.library.register_fake("stepquant::native_u8s8", _shape, lib=_library)
