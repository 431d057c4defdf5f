"""Our own u8 x s8 products for x86 CPUs with AVX-512 VNNI or AMX (`runtime.ops.native`).

Against oneDNN's through torch: no set-up in each call, of which a denoiser makes a hundred, most
on small images; scale, zero point and bias are read from the step table where they lie; the zero
point's share is taken off in integers; a gate and a residual are joined as the result is written.
The product itself is `ops.fused.tiled_product`.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor

from stepquant.runtime.ops import native, operators
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import products, tiles
from stepquant.runtime.ops.native.tiles import differences

__all__ = ["differences", "lay_out", "prepare", "run", "why_not"]

MOST_COLUMNS = 1 << 16  # whose products, and the zero point's, an int32 holds


def why_not(spec: LayerSpec, device: torch.device) -> str | None:
    """The reason why this kernel cannot take the layer on `device`, or None."""
    if device.type != "cpu":
        return f"made for the CPU, the layer is on {device.type}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"made for x86-64, the machine is {platform.machine()}"
    if spec.columns > MOST_COLUMNS:
        return f"holds sums of {MOST_COLUMNS} products, the layer has {spec.columns}"
    return native.why_no_products()


def prepare(weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> tuple[Tensor, ...]:
    """`(weight in tiles, weight_scale, weight sums [C_out] int32)`."""
    sums = weight.flatten(1).sum(dim=1, dtype=torch.int32)
    return lay_out(weight, weight_scale, spec), weight_scale.contiguous(), sums


def lay_out(weight: Tensor, weight_scale: Tensor, spec: LayerSpec) -> Tensor:
    """See `native.tiles.lay_out`."""
    del weight_scale
    return tiles.lay_out(weight, spec)


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
    laid_out, scale, sums = state
    weight = products.Weight(laid_out, scale, sums, bias, None, (), b"")
    return torch.ops.stepquant.tiled_product(
        *(codes, act_scale, act_zero_point.to(torch.uint8), None, 255, None),
        *operators.product_values(weight, spec, spec.padding),
        *(accumulate, torch.float32, None),
    )
