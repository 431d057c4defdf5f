"""Native u8 x s8 products for x86 CPUs from AVX2 on, and for ARM (`runtime.ops.native`).

Compared with oneDNN's kernels through torch,

- calls have no setup cost, which matters because a denoiser makes a hundred of them, most on small
  images;
- the kernel reads scale, zero point and bias from the step table in place;
- it subtracts the zero point's share in integers;
- it applies gate and residual while it writes the result.

The product itself is `ops.fused.tiled_product`.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.kernels.kernel import BoundWeight, State, TakesCodes
from stepquant.runtime.kernels.registry import kernel_of, register_kernel
from stepquant.runtime.ops import fused, native, operators
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import build, tiled_weight, tiles
from stepquant.support.refusal import Refusal, RefusalCode

MOST_COLUMNS = 1 << 16  # with more, the sum or the zero point's share may overflow int32


@register_kernel(priority=300)
class NativeKernel(TakesCodes):
    """Integer products in C++; `ops.native.tiles` defines the layout."""

    name = Backend.NATIVE.value
    device_types = ("cpu",)

    def why_not(self, spec: LayerSpec, device: torch.device) -> Refusal | None:
        """Why this kernel cannot run the layer on `device`, or None."""
        if device.type != "cpu":
            return Refusal(RefusalCode.DEVICE, f"needs the CPU, but the layer is on {device.type}")
        if platform.machine().lower() not in build.MACHINES:
            return Refusal(
                RefusalCode.MACHINE,
                f"needs x86-64 or 64-bit ARM, but the machine is {platform.machine()}",
            )
        if spec.columns > MOST_COLUMNS:
            return Refusal(
                RefusalCode.SHAPE,
                f"sums at most {MOST_COLUMNS} products, but the layer has {spec.columns}",
            )
        return native.why_no_products()

    def prepare(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> State:
        """`(weight in tiles, weight_scale, weight sums [C_out] int32)`."""
        sums = weight.flatten(1).sum(dim=1, dtype=torch.int32)
        return self.lay_out(weight, weight_scale, spec), weight_scale.contiguous(), sums

    def lay_out(self, weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
        """See `native.tiles.lay_out`."""
        del weight_scale
        return tiles.lay_out(weight, spec)

    def differences(self, laid_out: Tensor, spec: LayerSpec) -> Tensor:
        """See `kernels.kernel`."""
        return tiles.differences(laid_out, spec)

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
        laid_out, scale, sums = state
        weight = tiled_weight.Weight(laid_out, scale, sums, bias, None, (), b"")
        return torch.ops.stepquant.tiled_product(
            *(codes, act_scale, act_zero_point.to(torch.uint8), None, 255, None),
            *operators.product_values(weight, spec, spec.padding),
            *(accumulate, torch.float32, None),
        )

    def bind(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> BoundWeight:
        """See `kernels.kernel`."""
        return NativeWeight(state, bias, step_bias, spec)


NATIVE = kernel_of(NativeKernel)


class NativeWeight(BoundWeight):
    """Caches the C struct with the addresses of weight and biases."""

    def __init__(
        self, state: State, bias: Tensor | None, step_bias: Tensor | None, spec: LayerSpec
    ) -> None:
        laid_out, scale, sums = state
        self.held, self.spec = tiled_weight.weight_of(laid_out, scale, sums, bias, step_bias), spec

    def is_current(self, bias: Tensor | None, step_bias: Tensor | None) -> bool:
        """Whether these are the bound biases, and all tensors are still at their addresses."""
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
        return fused.tiled_product(codes, grid, self.held, self.spec, added, overwrite, dtype, gate)

    def run_to_codes(
        self,
        codes: Tensor,
        grid: Grid,
        activation: str,
        gated: bool,
        output_grid: Grid,
        dtype: torch.dtype,
    ) -> Tensor:
        """See `BoundWeight`; layers of whole tiles run as one fused kernel."""
        if not tiles.fits_in_tiles(self.spec, gated):
            return super().run_to_codes(codes, grid, activation, gated, output_grid, dtype)
        return fused.tiled_product_codes(
            codes, grid, self.held, self.spec, activation, gated, output_grid
        )
