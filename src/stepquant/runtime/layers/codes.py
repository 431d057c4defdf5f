"""Packed layers that are handed codes: the fast path of the CPU.

`IntegerLayer.forward` takes floats and makes codes of them. What stands before a layer (a norm, an
activation, a sum) can make the codes in the same pass over memory, in the frame that a padded conv
wants, and leave the float tensor out; then the layer begins here. The numbers are those of
`IntegerLayer.forward` but for the order of float operations before the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from stepquant.runtime.kernels import TAKE_CODES, onednn
from stepquant.runtime.kernels import native as native_kernel
from stepquant.runtime.kernels.onednn import CallConstants
from stepquant.runtime.layers.prepared import PreparedPart
from stepquant.runtime.layers.resident import state_of
from stepquant.runtime.ops import fused, native
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.native.calls import grid_addresses, grid_structure
from stepquant.runtime.ops.native.products import Weight, weight_of

if TYPE_CHECKING:
    from stepquant.runtime.layers.integer import IntegerLayer

FLOATS = (torch.float32, torch.bfloat16)
NO_VNNI = "no VNNI"
OTHER_KERNEL = "the kernel "


def untouched(module: nn.Module) -> bool:
    """Whether calling `module` is calling its `forward`: no hooks, none of accelerate's either."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )


def why_not_from_outside(layer: nn.Module | None, parts: int | None = None) -> str | None:
    """Why a block cannot run `layer` by `run` now to the same result as by calling it, or None.

    `parts`: how many input parts the block can feed; None: any number. No layer at all is no
    obstacle. Beside the reasons of `why_not` there is whatever else looks at the layer's float
    input: a LoRA, a bypass, a hook.
    """
    if layer is None:
        return None
    if not hasattr(layer, "prepared_parts"):  # packed.py imports this module
        return f"a layer of the class {type(layer).__name__}"
    packed: IntegerLayer = layer  # type: ignore[assignment]
    if packed.lora is not None:
        return "a LoRA"
    if packed.bypass is not None:
        return "an input error bypass"
    if not untouched(packed):
        return "a hook"
    if parts is not None and len(packed.splits) != parts:
        return "a layer with several input parts"
    return why_not(packed)


def why_not(layer: IntegerLayer) -> str | None:
    """Why `run` does not do now what the layer's own kernel does with its codes, or None.

    It does not where the kernel does not take codes or was asked for by its name, wants two calls
    (oneDNN's without VNNI), or samples of the batch are at different steps.
    """
    if torch.compiler.is_compiling():
        return "torch.compile"
    if layer.backend != "auto":
        return f"the backend '{layer.backend}'"
    if layer.steps != 1:
        rows = layer.context.rows
        if rows.numel() != 1:
            return "samples at different timesteps"
        if not rows.is_cpu:
            return f"timesteps on {rows.device.type}"
    for part in layer.prepared_parts():
        if part.kernel not in TAKE_CODES:
            return f"{OTHER_KERNEL}{part.kernel_name}"
        if part.kernel is onednn and part.spec.pair_overflows_int16 and onednn.pairs_saturate():
            return NO_VNNI
    return None


def grid_in_force(layer: IntegerLayer, part: PreparedPart) -> Grid:
    """The activation grid of an input part at the step of the forward in flight.

    It is the same object as long as step and memory are, with what native kernels want to know.
    """
    row = None if layer.steps == 1 else layer.context.rows
    if part.grid_in_force is not None:
        known, addresses = part.grid_in_force
        if known.row is row and addresses == grid_addresses(known):
            return known
    grid = part.grid._replace(row=row)
    if native.available() and (row is None or row.is_cpu):
        grid = grid._replace(structure=grid_structure(grid))
        part.grid_in_force = grid, grid_addresses(grid)
    return grid


def grid_of(layer: IntegerLayer) -> Grid:
    """The activation grid in force of a layer with one input part."""
    (part,) = layer.prepared_parts()
    return grid_in_force(layer, part)


def outputs(layer: IntegerLayer) -> list[Output]:
    """What a producer of the whole input `[B, C_in, H, W]` has to make of it for a conv layer."""
    return [
        Output(part.start, part.spec.in_channels, grid_in_force(layer, part), part.spec.padding)
        for part in layer.prepared_parts()
    ]


def encode(layer: IntegerLayer, x: Tensor, activation: str = "none") -> list[Tensor]:
    """The codes of `activation(x)` for `run`, one tensor for each input part."""
    if x.dim() == 4 and layer.spec.kind == "linear":  # no image, whose channels come second
        codes = encode(layer, x.flatten(0, 2), activation)
        return [code.view(*x.shape[:3], code.shape[-1]) for code in codes]
    inputs = x.split(layer.splits, dim=layer.channel_dim) if len(layer.splits) > 1 else (x,)
    return [
        fused.encode(each, activation, grid_in_force(layer, part), part.spec.padding)
        for each, part in zip(inputs, layer.prepared_parts(), strict=True)
    ]


def encode_parts(layer: IntegerLayer, inputs: Sequence[Tensor]) -> list[Tensor]:
    """`encode` of `inputs [B, C_i, H, W]` joined over channels, without joining what is split."""
    if tuple([each.shape[1] for each in inputs]) != tuple(layer.splits):
        return encode(layer, inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), dim=1))
    return [
        fused.encode(each, "none", grid_in_force(layer, part), part.spec.padding)
        for each, part in zip(inputs, layer.prepared_parts(), strict=True)
    ]


def run(
    layer: IntegerLayer,
    codes: Sequence[Tensor],
    added: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    gate: Tensor | None = None,
) -> Tensor:
    """What `layer` gives for its input's `codes`, times `gate`, plus `added`.

    `codes`: uint8, one tensor for each input part: `[B, C, H + 2 ph, W + 2 pw]` channels last with
    the part's zero point around the image, or `[..., C]` for linear layers. `added`: float, in the
    result's shape; it may be written over if `overwrite` is set and it is float32. `gate`: float
    `[B, C_out]`, the same for everything in a sample; only of a layer with one input part. The
    result has `dtype`, is channels last or contiguous, and is rounded to it once.
    """
    assert gate is None or len(codes) == 1
    y = added
    last = len(codes) - 1
    for part, code in zip(layer.prepared_parts(), codes, strict=True):
        mine = overwrite or part.index > 0
        out = dtype if part.index == last else torch.float32
        if part.kernel is native_kernel:
            weight, grid = _held(layer, part), grid_in_force(layer, part)
            y = native_kernel.run_codes(weight, code, grid, part.spec, y, mine, out, gate)
        else:
            constants = part.constants or _constants(layer, part)
            y = onednn.run_codes(
                state_of(layer, part), code, constants, part.spec, y, mine, out, gate
            )
    assert y is not None
    return y


def run_to_codes(
    layer: IntegerLayer,
    code: Tensor,
    activation: str,
    gated: bool,
    output_grid: Grid,
    dtype: torch.dtype,
) -> Tensor:
    """Codes of the activation of what a linear `layer` with one input part gives for `code`.

    `gated`: of the first half of its channels times the activation of the second. Where the kernel
    makes the codes itself, the values between are not written to memory; else they have `dtype`.
    """
    (part,) = layer.prepared_parts()
    if part.kernel is native_kernel and native_kernel.fits_in_tiles(part.spec, gated):
        weight, grid = _held(layer, part), grid_in_force(layer, part)
        return native_kernel.run_to_codes(
            weight, code, grid, part.spec, activation, gated, output_grid
        )
    y = run(layer, [code], dtype=dtype)
    if gated:
        return fused.gated_encode(y, activation, output_grid)
    return fused.encode(y, activation, output_grid)


def _held(layer: IntegerLayer, part: PreparedPart) -> Weight:
    """What the native kernel reads; kept as long as the layer holds the same tensors."""
    buffers, held = layer._buffers, part.held  # attributes of modules are slow to look up
    first = part.index == 0
    bias, step_bias = (buffers["bias"], buffers["step_bias"]) if first else (None, None)
    same = held is not None and held.bias is bias and held.step_bias is step_bias
    if held is not None and same and held.in_place():
        return held
    tiles, scale, sums = state_of(layer, part)
    held = weight_of(tiles, scale, sums, bias, step_bias)
    if part.weight is not None:  # else the tiles are to go after the call
        part.held = held
    return held


def _constants(layer: IntegerLayer, part: PreparedPart) -> CallConstants:
    """Those of the step of the forward in flight; kept where there is only one."""
    grid, is_conv = grid_in_force(layer, part), part.spec.kind == "conv2d"
    bias, step_bias = (layer.bias, layer.step_bias) if part.index == 0 else (None, None)
    scale, bias = fused.epilogue(grid, part.rest[2], bias, step_bias, is_conv)
    found = CallConstants(float(scale), int(grid.in_force()[1]), bias)
    if grid.row is None and step_bias is None:
        part.constants = found
    return found
