"""Packed layers that are handed codes: the fast path of the CPU.

`PackedLayer.forward` takes floats and makes codes of them. What stands before a layer (a norm, an
activation, a sum) can make the codes in the same pass over memory, in the frame that a padded conv
wants, and leave the float tensor out; then the layer begins here. The numbers are those of
`PackedLayer.forward` but for the order of float operations before the rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from stepquant.runtime import fused, native
from stepquant.runtime.grids import Grid, Output
from stepquant.runtime.kernels import cpu
from stepquant.runtime.prepared import CallConstants, PreparedPart
from stepquant.runtime.resident import state_of

if TYPE_CHECKING:
    from stepquant.runtime.packed import PackedLayer

FEW_ROWS = 8
LARGEST_FEW = 1 << 21  # weights, which are held once more in rows
MOST_COLUMNS = 1 << 15  # whose products an int32 sum holds, whatever the codes are
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
    packed: PackedLayer = layer  # type: ignore[assignment]
    if packed.lora is not None:
        return "a LoRA"
    if packed.bypass is not None:
        return "an input error bypass"
    if not untouched(packed):
        return "a hook"
    if parts is not None and len(packed.splits) != parts:
        return "a layer with several input parts"
    return why_not(packed)


def why_not(layer: PackedLayer) -> str | None:
    """Why `run` does not do now what the layer's own kernel does with its codes, or None.

    It does not where another kernel than oneDNN's was chosen or asked for, the kernel wants two
    calls (no VNNI), the input is scaled by channel, or samples of the batch are at different steps.
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
        if part.kernel is not cpu:
            return f"{OTHER_KERNEL}{part.kernel_name}"
        if part.inverse_channel_scale is not None:
            return "inputs that are scaled by channel"
        if part.spec.pair_overflows_int16 and cpu.pairs_saturate():
            return NO_VNNI
    return None


def grid_in_force(layer: PackedLayer, part: PreparedPart) -> Grid:
    """The activation grid of an input part at the step of the forward in flight."""
    return part.grid if layer.steps == 1 else part.grid._replace(row=layer.context.rows)


def grid_of(layer: PackedLayer) -> Grid:
    """The activation grid in force of a layer with one input part."""
    (part,) = layer.prepared_parts()
    return grid_in_force(layer, part)


def outputs(layer: PackedLayer) -> list[Output]:
    """What a producer of the whole input `[B, C_in, H, W]` has to make of it for a conv layer."""
    return [
        Output(part.start, part.spec.in_channels, grid_in_force(layer, part), part.spec.padding)
        for part in layer.prepared_parts()
    ]


def encode(layer: PackedLayer, x: Tensor, activation: str = "none") -> list[Tensor]:
    """The codes of `activation(x)` for `run`, one tensor for each input part."""
    inputs = x.split(layer.splits, dim=layer.channel_dim) if len(layer.splits) > 1 else (x,)
    return [
        fused.encode(each, activation, grid_in_force(layer, part), part.spec.padding)
        for each, part in zip(inputs, layer.prepared_parts(), strict=True)
    ]


def encode_parts(layer: PackedLayer, inputs: Sequence[Tensor]) -> list[Tensor]:
    """`encode` of `inputs [B, C_i, H, W]` joined over channels, without joining what is split."""
    if tuple([each.shape[1] for each in inputs]) != tuple(layer.splits):
        return encode(layer, inputs[0] if len(inputs) == 1 else torch.cat(list(inputs), dim=1))
    return [
        fused.encode(each, "none", grid_in_force(layer, part), part.spec.padding)
        for each, part in zip(inputs, layer.prepared_parts(), strict=True)
    ]


def run(
    layer: PackedLayer,
    codes: Sequence[Tensor],
    accumulate: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What `layer` gives for its input's `codes`.

    `codes`: uint8, one tensor for each input part: `[B, C, H + 2 ph, W + 2 pw]` channels last with
    the part's zero point around the image, or `[..., C]` for linear layers. `accumulate`: float32
    in the result's shape, channels last; it is added, and overwritten. The result has `dtype`,
    which is float32 where there are several parts or something to add.
    """
    y = accumulate
    for part, code in zip(layer.prepared_parts(), codes, strict=True):
        constants = part.constants or _constants(layer, part)
        state = state_of(layer, part)
        if part.spec.kind == "linear":
            y = cpu.run_linear_codes(state, code, constants, y, dtype)
        else:
            y = cpu.run_conv_codes(state, code, constants, y, part.spec, dtype)
    assert y is not None
    return y


def run_rows(layer: PackedLayer, x: Tensor, activation: str = "none") -> Tensor:
    """What a linear layer that takes codes gives for `activation(x)`, `x [..., C_in]`: float32.

    A few rows, such as a time embedding, do not pay for a matrix kernel's set-up.
    """
    parts = layer.prepared_parts()
    part = parts[0]
    few = (
        native.available()
        and len(parts) == 1
        and x.numel() <= FEW_ROWS * part.spec.in_channels
        and part.spec.in_channels <= MOST_COLUMNS
    )
    if not few or part.weight is None or part.weight.numel() > LARGEST_FEW:
        return run(layer, encode(layer, x, activation))
    if part.row_weight is None:
        part.row_weight = part.weight.to_dense().t().contiguous()
    constants, grid = part.constants or _constants(layer, part), grid_in_force(layer, part)
    return fused.linear_of_few_rows(
        x, activation, grid, part.row_weight, part.rest[0], constants.bias
    )


def _constants(layer: PackedLayer, part: PreparedPart) -> CallConstants:
    """Those of the step of the forward in flight; kept where there is only one."""
    grid, is_conv = grid_in_force(layer, part), part.spec.kind == "conv2d"
    bias, step_bias = (layer.bias, layer.step_bias) if part.index == 0 else (None, None)
    scale, bias = fused.epilogue(grid, part.rest[2], bias, step_bias, is_conv)
    found = CallConstants(float(scale), int(grid.in_force()[1]), bias)
    if grid.row is None and step_bias is None:
        part.constants = found
    return found
