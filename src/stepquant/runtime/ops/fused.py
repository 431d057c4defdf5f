"""What lies between a model's integer layers, done in one pass: float images in, codes out.

Each function has a plain form of torch operations, which says what it computes, and a native one
(`ops.native`) that reads each value once or twice instead of ten times. The native one is taken
for float32 and bfloat16 tensors on a CPU where the library is there; what torch.compile traces is
the plain one. Both compute in float32. Their codes differ only where the value before it is rounded
is a tie, up to the last bits of a float; without a norm or an activation they do not differ.

Everything is forward only: codes have no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.ops import native
from stepquant.runtime.ops.encoding import encode as packed_encode
from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.native import Library, calls
from stepquant.runtime.ops.native.structures import ACTIVATIONS
from stepquant.support.errors import StepQuantError

__all__ = [
    "Grid",
    "Output",
    "encode",
    "epilogue",
    "gated_encode",
    "group_norm_encode",
    "layer_norm_encode",
]

_NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def group_norm_encode(
    parts: Sequence[Tensor],
    added: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    outputs: Sequence[Output],
) -> list[Tensor]:
    """Codes of `activation(group_norm(cat(parts) + added))`, one image for each of `outputs`.

    `parts`: float images `[B, C_i, H, W]`, read where they lie if their channels lie side by side;
    `C` is the sum of `C_i`, and groups may straddle parts. `added`: float `[B, C]`, the same for
    all pixels, or None. `weight`, `bias`: float `[C]` or None. `activation`: "none" or "silu".

    Each result is uint8 `[B, channels, H + 2 ph, W + 2 pw]`, channels last: `encode` of the
    output's channels. Outputs may take the same channels. Raises StepQuantError for an unknown
    activation and for shapes that do not fit.
    """
    if activation not in ("none", "silu"):
        raise StepQuantError(f"activation '{activation}' after a group norm: expected none or silu")
    batch, _, height, width = parts[0].shape
    channels = 0
    for part in parts:
        shape = part.shape
        channels += shape[1]
        if shape[0] != batch or shape[2] != height or shape[3] != width:
            raise StepQuantError(
                f"parts of {tuple(shape)} and {tuple(parts[0].shape)}: expected the same batch, "
                "height and width"
            )
    if channels % groups:
        raise StepQuantError(f"{channels} channels do not make {groups} groups")
    _check_channels(channels, weight, bias)
    if added is not None and added.shape != (batch, channels):
        raise StepQuantError(f"what is added is {tuple(added.shape)}: expected {(batch, channels)}")
    for out in outputs:
        if out.start < 0 or out.start + out.channels > channels:
            raise StepQuantError(
                f"an output takes channels {out.start} to {out.start + out.channels} of {channels}"
            )
        out.grid.check_channels(out.channels)
    library = _library(*parts)
    arguments = (parts, added, groups, weight, bias, eps, activation, outputs)
    if library is None:
        return plain_group_norm_encode(*arguments)
    return calls.group_norm_encode(library, *arguments)


def plain_group_norm_encode(
    parts: Sequence[Tensor],
    added: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    outputs: Sequence[Output],
) -> list[Tensor]:
    """`group_norm_encode` with torch."""
    x = torch.cat([part.to(torch.float32) for part in parts], dim=1)
    if added is not None:
        x = x + added.to(torch.float32)[:, :, None, None]
    y = functional.group_norm(x, groups, _float32(weight), _float32(bias), eps)
    y = _activate(y, activation)
    return [
        plain_encode(y[:, out.start : out.start + out.channels], "none", out.grid, out.padding)
        for out in outputs
    ]


def encode(
    x: Tensor, activation: str, output_grid: Grid, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Codes of `activation(x)`: `clamp(round(y * (1 / scale)) + zero_point, 0, largest)`, uint8.

    `y` is multiplied by the grid's factors before, if it has any. `activation`: "none", "silu",
    "gelu" or "gelu_tanh". `x`: float of any shape. Images `[B, C, H, W]` come back channels last,
    with `padding` rows and columns of the zero point around them; anything else contiguous and of
    the same shape, and takes no padding. Raises StepQuantError for an unknown activation, for a
    padding that cannot be, and for factors of other channels; so do the functions below.
    """
    _check_activation(activation)
    if x.dim() != 4 and any(padding):
        raise StepQuantError(f"padding {padding} around {x.dim()} dimensions: expected 4")
    if output_grid.factors is not None:
        output_grid.check_channels(x.shape[1 if x.dim() == 4 else -1])
    library = _library(x)
    if library is None:
        return plain_encode(x, activation, output_grid, padding)
    return calls.encode(library, x, activation, output_grid, padding)


def plain_encode(
    x: Tensor, activation: str, output_grid: Grid, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """`encode` with torch."""
    channel_dim = 1 if x.dim() == 4 else -1
    codes = _plain_codes(_activate(x.to(torch.float32), activation), output_grid, channel_dim)
    if x.dim() != 4:
        return codes
    return pad(codes, output_grid.in_force()[1], padding)


def layer_norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    grids: Sequence[Grid],
) -> list[Tensor]:
    """Codes of `layer_norm(x) * (1 + scale) + shift`, uint8 of the shape of `x` for each grid.

    `x`: float `[B, ..., C]`; the norm is over `C`. `weight`, `bias`: float `[C]` or None. `scale`,
    `shift`: float `[B, C]`, the same for everything in a sample, or None. Raises StepQuantError for
    shapes that do not fit.
    """
    _check_channels(x.shape[-1], weight, bias)
    for name, each in (("scale", scale), ("shift", shift)):
        if each is not None and (x.dim() < 2 or each.shape != (x.shape[0], x.shape[-1])):
            raise StepQuantError(
                f"{name} is {tuple(each.shape)} for {tuple(x.shape)}: expected a row for each "
                "sample"
            )
    for grid in grids:
        grid.check_channels(x.shape[-1])
    library = _library(x)
    if library is None:
        return plain_layer_norm_encode(x, weight, bias, eps, scale, shift, grids)
    return calls.layer_norm_encode(library, x, weight, bias, eps, scale, shift, grids)


def plain_layer_norm_encode(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    grids: Sequence[Grid],
) -> list[Tensor]:
    """`layer_norm_encode` with torch."""
    channels = x.shape[-1]
    y = x.to(torch.float32)
    y = functional.layer_norm(y, (channels,), _float32(weight), _float32(bias), eps)
    middle = (x.shape[0], *(1,) * (x.dim() - 2), channels)
    if scale is not None:
        y = y * (1 + scale.to(torch.float32).view(middle))
    if shift is not None:
        y = y + shift.to(torch.float32).view(middle)
    return [_plain_codes(y, grid) for grid in grids]


def gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> Tensor:
    """Codes of `first * activation(second)`, the halves of `x`.

    `x`: float `[..., 2 C]`; the result is uint8 `[..., C]`. `gate_activation` as in `encode`.
    Raises StepQuantError for an unknown one and for an odd number of channels.
    """
    _check_activation(gate_activation)
    if x.shape[-1] % 2:
        raise StepQuantError(f"{x.shape[-1]} channels have no halves: expected an even number")
    output_grid.check_channels(x.shape[-1] // 2)
    library = _library(x)
    if library is None:
        return plain_gated_encode(x, gate_activation, output_grid)
    return calls.gated_encode(library, x, gate_activation, output_grid)


def plain_gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> Tensor:
    """`gated_encode` with torch."""
    values, gates = x.to(torch.float32).chunk(2, dim=-1)
    return _plain_codes(values * _activate(gates, gate_activation), output_grid)


def epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> tuple[Tensor, Tensor]:
    """`(scale, bias)` of an integer layer's call, float32 `[1]` and `[C_out]`.

    The bias is `bias + step_bias[row] - scale * zero_point * sums`: `bias [C_out]` and `step_bias
    [T, C_out]` where they are given, the zero point's share with `sums [C_out]` (of the weight that
    the codes stand for) if `add_share`. Raises StepQuantError for shapes that do not fit.
    """
    channels = sums.shape[0]
    _check_channels(channels, None, bias)
    if step_bias is not None and step_bias.shape != (grid.scale.shape[0], channels):
        raise StepQuantError(
            f"the biases of steps are {tuple(step_bias.shape)}: "
            f"expected {(grid.scale.shape[0], channels)}"
        )
    library = _library(sums)
    if library is None:
        return plain_epilogue(grid, sums, bias, step_bias, add_share)
    return calls.epilogue(library, grid, sums, bias, step_bias, add_share)


def plain_epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> tuple[Tensor, Tensor]:
    """`epilogue` with torch."""
    scale, zero_point = grid.in_force()
    found = torch.zeros_like(sums) if bias is None else bias
    if step_bias is not None:
        found = found + (step_bias[0] if grid.row is None else step_bias[grid.row][0])
    if add_share:
        found = found - scale * zero_point * sums
    return scale, found


def _library(*inputs: Tensor) -> Library | None:
    """The native kernels, where they can take these inputs."""
    if torch.compiler.is_compiling():
        return None
    for x in inputs:
        if not x.is_cpu or x.dtype not in _NATIVE_DTYPES or not x.numel():
            return None
    return native.library()


def _plain_codes(y: Tensor, grid: Grid, channel_dim: int = -1) -> Tensor:
    y = grid.scaled(y, channel_dim)
    return packed_encode(y, *grid.in_force(), grid.largest.bit_length()).contiguous()


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(x)
    if activation == "gelu":
        return functional.gelu(x)
    if activation == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    return x


def _float32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.float32)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise StepQuantError(
            f"unknown activation '{activation}': expected one of {', '.join(ACTIVATIONS)}"
        )


def _check_channels(channels: int, weight: Tensor | None, bias: Tensor | None) -> None:
    for name, each in (("weight", weight), ("bias", bias)):
        if each is not None and each.shape != (channels,):
            raise StepQuantError(f"the {name} is {tuple(each.shape)}: expected {(channels,)}")
