"""Argument checks of the fused passes, for all implementations.

Each function takes the arguments of its namesake in `ops.fused` and raises StepQuantError for
invalid ones. Native kernels compute addresses from these arguments, so every call is checked first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import tiles
from stepquant.runtime.ops.native.structures import ACTIVATIONS
from stepquant.runtime.ops.native.tiled_weight import Weight
from stepquant.runtime.ops.result_shapes import check_channels, shape_of
from stepquant.support.errors import StepQuantError

FLOATS = (torch.float32, torch.bfloat16)


def group_norm_encode(
    parts: Sequence[Tensor],
    added: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    outputs: Sequence[Output],
) -> None:
    """Check the shapes of all operands, and the channels of each output."""
    del eps
    if activation not in ("none", "silu"):
        raise StepQuantError(
            f"unknown activation '{activation}' after a group norm: expected none or silu"
        )
    batch, _, height, width = parts[0].shape
    channels = 0
    for part in parts:
        shape = part.shape
        channels += shape[1]
        if shape[0] != batch or shape[2] != height or shape[3] != width:
            raise StepQuantError(
                f"input parts have the shapes {tuple(parts[0].shape)} and {tuple(shape)}: expected "
                "equal batch, height and width"
            )
    if channels % groups:
        raise StepQuantError(
            f"a group norm has {channels} channels: expected a multiple of its {groups} groups"
        )
    _check_biases(channels, weight, bias)
    if added is not None and added.shape != (batch, channels):
        raise StepQuantError(
            f"the added tensor is {tuple(added.shape)}: expected {(batch, channels)}"
        )
    for out in outputs:
        if out.start < 0 or out.start + out.channels > channels:
            raise StepQuantError(
                f"an output takes channels {out.start} to {out.start + out.channels}: expected a "
                f"range within the {channels} channels of the input"
            )
        out.grid.check_channels(out.channels)


def encode(x: Tensor, activation: str, output_grid: Grid, padding: tuple[int, int]) -> None:
    """Check the activation's name, the padding, and the number of factors."""
    _check_activation(activation)
    if x.dim() != 4 and any(padding):
        raise StepQuantError(
            f"padding is {padding} for {x.dim()} dimensions: expected none, or 4 dimensions"
        )
    if output_grid.factors is not None:
        output_grid.check_channels(x.shape[1 if x.dim() == 4 else -1])


def layer_norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    grids: Sequence[Grid],
) -> None:
    """Check the shapes of weight, bias and modulation, and the number of factors."""
    del eps
    _check_biases(x.shape[-1], weight, bias)
    for name, each in (("scale", scale), ("shift", shift)):
        if each is not None and (x.dim() < 2 or each.shape != (x.shape[0], x.shape[-1])):
            raise StepQuantError(
                f"the modulation's {name} is {tuple(each.shape)} for an input of {tuple(x.shape)}: "
                "expected one row of channels per sample"
            )
    for grid in grids:
        grid.check_channels(x.shape[-1])


def gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> None:
    """Check the activation's name, that channels are even, and the number of factors."""
    _check_activation(gate_activation)
    if x.shape[-1] % 2:
        raise StepQuantError(f"a gated input has {x.shape[-1]} channels: expected an even number")
    output_grid.check_channels(x.shape[-1] // 2)


def epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> None:
    """Check the shapes of the biases."""
    del add_share
    channels = sums.shape[0]
    _check_biases(channels, None, bias)
    _check_step_bias(step_bias, grid, channels)


def tiled_product(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    added: Tensor | None,
    dtype: torch.dtype,
    gate: Tensor | None,
) -> None:
    """Check the weight's layout, and the shapes and dtypes of all operands."""
    del dtype
    _check_weight(weight, grid, spec)
    product_operands(shape_of(codes, spec).sizes, spec, added, gate)


def product_operands(
    sizes: tuple[int, ...], spec: LayerSpec, added: Tensor | None, gate: Tensor | None
) -> None:
    """Check the shapes and dtypes of `added` and `gate` for a result of `sizes`."""
    if gate is not None:
        _check_float("gate", gate, (sizes[0], spec.out_channels))
    if added is not None:
        _check_float("sum", added, sizes)


def tiled_product_codes(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    activation: str,
    gated: bool,
    output_grid: Grid,
) -> None:
    """Check that the weight is a linear layer's in whole tiles, and the number of factors."""
    _check_activation(activation)
    check_channels(codes, spec)
    _check_weight(weight, grid, spec)
    if not tiles.fits_in_tiles(spec, gated):
        raise StepQuantError(
            f"a {spec.kind} layer with {spec.out_channels} out-channels cannot return codes: "
            f"expected a linear layer with a multiple of {tiles.TILE * (2 if gated else 1)} "
            "out-channels"
        )
    output_grid.check_channels(spec.out_channels // 2 if gated else spec.out_channels)


def attention_codes(query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid) -> None:
    """Check the operands' shapes, that channels divide into heads, and the number of factors."""
    batch, channels = query.shape[0], query.shape[2]
    expected = (batch, key.shape[1], channels)
    if key.shape != value.shape or key.shape != expected:
        raise StepQuantError(
            f"attention's keys are {tuple(key.shape)} and its values {tuple(value.shape)}: "
            f"expected {expected} for both"
        )
    if channels % heads:
        raise StepQuantError(
            f"attention has {channels} channels: expected a multiple of its {heads} heads"
        )
    grid.check_channels(channels)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise StepQuantError(
            f"unknown activation '{activation}': expected one of {', '.join(ACTIVATIONS)}"
        )


def _check_biases(channels: int, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and each.shape != (channels,):
            raise StepQuantError(f"the {name} is {tuple(each.shape)}: expected {(channels,)}")


def _check_step_bias(step_bias: Tensor | None, grid: Grid, channels: int) -> None:
    if step_bias is not None and step_bias.shape != (grid.scale.shape[0], channels):
        raise StepQuantError(
            f"the step bias is {tuple(step_bias.shape)}: expected {(grid.scale.shape[0], channels)}"
        )


def _check_weight(weight: Weight, grid: Grid, spec: LayerSpec) -> None:
    tiles.check(weight.tiles, spec)
    if weight.sums.shape != (spec.out_channels,) or weight.sums.dtype is not torch.int32:
        raise StepQuantError(
            f"the weight's sums are {weight.sums.dtype} {tuple(weight.sums.shape)}: expected "
            f"int32 {(spec.out_channels,)}"
        )
    _check_biases(spec.out_channels, weight.scale, weight.bias)
    _check_step_bias(weight.step_bias, grid, spec.out_channels)


def _check_float(what: str, x: Tensor, sizes: tuple[int, ...]) -> None:
    if x.shape != sizes or x.dtype not in FLOATS:
        raise StepQuantError(
            f"a layer's {what} is {x.dtype} {tuple(x.shape)}: expected float32 or bfloat16 {sizes}"
        )
