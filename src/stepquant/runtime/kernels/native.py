"""Our own u8 x s8 products for x86 CPUs with AVX-512 VNNI or AMX (`runtime.ops.native`).

Against oneDNN's through torch: no set-up in each call, of which a denoiser makes a hundred, most
on small images; scale, zero point and bias are read from the step table where they lie; the zero
point's share is taken off in integers; a gate and a residual are joined as the result is written.
The call is wrapped as an operator, which `torch.compile` treats as one opaque node.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.ops import native
from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import products
from stepquant.runtime.ops.result_shapes import check_channels, empty_result, planned_result

CHUNK, TILE, GROUP = 64, 16, 4  # of the layout, see native/tiles.h
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
    """int8 `[tiles, chunks, 16, 16, 4]`: 16 out-channels, and 64 columns in groups of four.

    A column is a tap's in-channel, taps first. Filled up with zeros. Where the weights of each
    out-channel span no more than 4 bits, it is uint8 `[tiles, bytes]` in their place, half as large
    (`native/weights.h` says how); the kernel unpacks what it is about to read.
    """
    del weight_scale
    rows = weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight
    missing = (-spec.columns % CHUNK, -spec.out_channels % TILE)
    rows = functional.pad(rows, (0, missing[0], 0, missing[1]))
    tiles = rows.view(-1, TILE, rows.shape[1] // CHUNK, CHUNK // GROUP, GROUP)
    tiles = tiles.permute(0, 2, 3, 1, 4).contiguous()
    lowest = rows.amin(dim=1)
    fits = (rows.amax(dim=1).to(torch.int16) - lowest <= 15).all()
    return _halved(tiles, lowest) if fits else tiles


def _halved(tiles: Tensor, lowest: Tensor) -> Tensor:
    """`tiles` in four bits, with the `lowest` int8 value of each row before them."""
    head = lowest.view(-1, TILE, 1).expand(-1, TILE, GROUP)  # [tiles, 16, 4]
    codes = (tiles - head[:, None, None]).view(torch.uint8).flatten(3)  # [tiles, chunks, 16, 64]
    body = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    return torch.cat([head.flatten(1).view(torch.uint8), body.flatten(1)], dim=1)


def _doubled(halved: Tensor) -> Tensor:
    """The tiles that `_halved` was given."""
    head = halved[:, : TILE * GROUP].view(torch.int8).view(-1, 1, 1, TILE, GROUP)
    body = halved[:, TILE * GROUP :].view(len(halved), -1, CHUNK // GROUP // 2, TILE * GROUP)
    codes = torch.stack([body & 15, body >> 4], dim=3).flatten(2, 3)
    return codes.view(torch.int8).unflatten(3, (TILE, GROUP)) + head


def differences(laid_out: Tensor, spec: LayerSpec) -> Tensor:
    """See the package docstring."""
    laid_out = _doubled(laid_out) if laid_out.dtype is torch.uint8 else laid_out
    rows = laid_out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
    rows = rows[: spec.out_channels, : spec.columns]
    if spec.kind == "linear":
        return rows
    by_taps = rows.reshape(spec.out_channels, *spec.kernel_size, spec.in_channels)
    return by_taps.permute(0, 3, 1, 2)


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
    check_channels(codes, spec)  # the operator takes their number from the codes
    return torch.ops.stepquant.native_u8s8(
        *(codes, act_scale, act_zero_point.to(torch.uint8), *state, bias, accumulate),
        *(spec.kind == "linear", spec.kernel_size, spec.stride, spec.padding, spec.dilation),
    )


def run_codes(
    weight: products.Weight,
    codes: Tensor,
    grid: Grid,
    spec: LayerSpec,
    added: Tensor | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    gate: Tensor | None = None,
) -> Tensor:
    """The layer of `codes` on `grid`, times `gate`, plus `added`; biases are those of `weight`.

    `codes`: uint8 `[B, C, H + 2 ph, W + 2 pw]`, channels last, with the zero point around the
    image, or `[..., C]`. `added`: float32 or bfloat16 in the result's shape; the result may be
    written to its place if `overwrite`. `gate`: float `[B, C_out]`, the same for everything in a
    sample. Sums are rounded once to float32, and to `dtype`.
    """
    if not codes.numel():
        return empty_result(codes, spec, dtype)
    library = native.library()
    assert library is not None
    return products.products(library, codes, grid, weight, spec, added, overwrite, dtype, gate)


def fits_in_tiles(spec: LayerSpec, gated: bool) -> bool:
    """Whether `run_to_codes` takes the layer."""
    return spec.kind == "linear" and spec.out_channels % ((2 if gated else 1) * TILE) == 0


def run_to_codes(
    weight: products.Weight,
    codes: Tensor,
    grid: Grid,
    spec: LayerSpec,
    activation: str,
    gated: bool,
    output_grid: Grid,
) -> Tensor:
    """Codes, on `output_grid`, of the activation of what a linear layer gives for `codes`.

    `gated`: of the first half of the channels times the activation of the second. The values
    between are float32 and are not written to memory. `codes`, `activation` and the result
    (uint8 `[..., C_out]`, or half of it) as in `fused.encode` and `fused.gated_encode`.
    """
    if not codes.numel():
        y = empty_result(codes, spec, torch.uint8)
        return y[..., : spec.out_channels // 2] if gated else y
    library = native.library()
    assert library is not None
    return products.product_codes(
        library, codes, grid, weight, spec, activation, gated, output_grid
    )


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
    held = products.weight_of(weight, weight_scale, sums, bias, None)
    return run_codes(held, codes, Grid(act_scale, act_zero_point, None, 255), spec, added)


def _shape(codes, act_scale, act_zero_point, weight, weight_scale, sums, bias, added, *geometry):  # type: ignore[no-untyped-def]
    return planned_result(codes, _spec(codes, weight_scale, *geometry))


_library.impl("native_u8s8", _native, "CPU")
torch.library.register_fake("stepquant::native_u8s8", _shape, lib=_library)
