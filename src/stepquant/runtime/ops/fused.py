"""What lies between a model's integer layers, done in one pass: float images in, codes out.

Each function is an operator of `torch.library`, `torch.ops.stepquant.<its name>`
(`ops.operators`), so `torch.compile` and `torch.export` see one node. Eager calls on the CPU skip
the dispatcher, which costs as much as a small image does (docs/explanation/runtime.md), and call
`ops.cpu`: native kernels that read each value once or twice instead of ten times, or the torch
operations of `ops.plain`. Other devices run what is registered for them, or `ops.plain`.

All compute in float32. Codes of two implementations differ only where the value before rounding is
a tie, up to the last bits of a float; without a norm or an activation they do not differ.

Everything is forward only: codes have no gradient. All functions raise StepQuantError for shapes
that do not fit and for unknown activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from stepquant.runtime.ops import cpu, native
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import checks
from stepquant.runtime.ops.native.tiled_weight import Weight
from stepquant.runtime.ops.operators import grid_lists, grid_values, product_values

__all__ = [
    "Grid",
    "Output",
    "attention_codes",
    "encode",
    "epilogue",
    "gated_encode",
    "group_norm_encode",
    "has_native_attention",
    "layer_norm_encode",
    "tiled_product",
    "tiled_product_codes",
]


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
    output's channels. Outputs may take the same channels.
    """
    if _direct(parts[0]):
        checks.group_norm_encode(parts, added, groups, weight, bias, eps, activation, outputs)
        return cpu.group_norm_encode(parts, added, groups, weight, bias, eps, activation, outputs)
    return torch.ops.stepquant.group_norm_encode(
        *(list(parts), added, groups, weight, bias, eps, activation),
        *grid_lists([out.grid for out in outputs]),
        [out.start for out in outputs],
        [out.channels for out in outputs],
        [rows for out in outputs for rows in out.padding],
    )


def encode(
    x: Tensor, activation: str, output_grid: Grid, padding: tuple[int, int] = (0, 0)
) -> Tensor:
    """Codes of `activation(x)`: `clamp(round(y * (1 / scale)) + zero_point, 0, largest)`, uint8.

    `y` is first multiplied by the grid's factors, if it has any. `activation`: "none", "silu",
    "gelu" or "gelu_tanh". `x`: float of any shape. Images `[B, C, H, W]` come back channels last,
    with `padding` rows and columns of the zero point around them; anything else comes back
    contiguous and of the same shape, and takes no padding.
    """
    if _direct(x):
        checks.encode(x, activation, output_grid, padding)
        return cpu.encode(x, activation, output_grid, padding)
    return torch.ops.stepquant.encode(x, activation, *grid_values(output_grid), padding)


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
    `shift`: float `[B, C]`, the same for everything in a sample, or None.
    """
    if _direct(x):
        checks.layer_norm_encode(x, weight, bias, eps, scale, shift, grids)
        return cpu.layer_norm_encode(x, weight, bias, eps, scale, shift, grids)
    return torch.ops.stepquant.layer_norm_encode(
        x, weight, bias, eps, scale, shift, *grid_lists(grids)
    )  # fmt: skip


def gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> Tensor:
    """Codes of `first * activation(second)`, the halves of `x`.

    `x`: float `[..., 2 C]`; the result is uint8 `[..., C]`. `gate_activation` as in `encode`.
    """
    if _direct(x):
        checks.gated_encode(x, gate_activation, output_grid)
        return cpu.gated_encode(x, gate_activation, output_grid)
    return torch.ops.stepquant.gated_encode(x, gate_activation, *grid_values(output_grid))


def epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> tuple[Tensor, Tensor]:
    """`(scale, bias)` of an integer layer's call, float32 `[1]` and `[C_out]`.

    The bias is `bias + step_bias[row] - scale * zero_point * sums`: `bias [C_out]` and `step_bias
    [T, C_out]` where they are given, the zero point's share with `sums [C_out]` (of the weight that
    the codes stand for) if `add_share`.
    """
    if _direct(sums):
        checks.epilogue(grid, sums, bias, step_bias, add_share)
        return cpu.epilogue(grid, sums, bias, step_bias, add_share)
    return torch.ops.stepquant.epilogue(*grid_values(grid), sums, bias, step_bias, add_share)


def tiled_product(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    added: Tensor | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    gate: Tensor | None = None,
) -> Tensor:
    """An integer layer of `codes` on `grid`, times `gate`, plus `added`.

    `codes`: uint8 `[B, C, H + 2 ph, W + 2 pw]`, channels last, with the zero point around the
    image, or `[..., C]`. `weight`: laid out by `native.tiles`, with the layer's biases. `added`:
    float32 or bfloat16 in the result's shape; eager calls may write the result to its place if
    `overwrite`. `gate`: float `[B, C_out]`, the same for everything in a sample. Sums are exact,
    rounded once to float32, and to `dtype`.
    """
    if _direct(codes):
        return cpu.tiled_product(codes, grid, weight, spec, added, dtype, gate, overwrite)
    return torch.ops.stepquant.tiled_product(
        *(codes, *grid_values(grid), *product_values(weight, spec, padding=(0, 0))),
        *(added, dtype, gate),
    )


def tiled_product_codes(
    codes: Tensor,
    grid: Grid,
    weight: Weight,
    spec: LayerSpec,
    activation: str,
    gated: bool,
    output_grid: Grid,
) -> Tensor:
    """Codes, on `output_grid`, of the activation of what a linear layer gives for `codes`.

    `gated`: of the first half of the channels times the activation of the second. The values
    between are float32 and are not written to memory. `codes`, `activation` and the result
    (uint8 `[..., C_out]`, or half of it) as in `encode` and `gated_encode`; `weight` as in
    `tiled_product`. `native.tiles.fits_in_tiles` says which layers can.
    """
    if _direct(codes):
        return cpu.tiled_product_codes(codes, grid, weight, spec, activation, gated, output_grid)
    return torch.ops.stepquant.tiled_product_codes(
        *(codes, *grid_values(grid), *product_values(weight, spec, padding=(0, 0))),
        *(activation, gated, *grid_values(output_grid)),
    )


def attention_codes(query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid) -> Tensor:
    """Codes of `softmax(Q K^T / sqrt(d)) V`, head by head: uint8 `[B, N, heads * d]`.

    `query [B, N, heads * d]`, `key` and `value [B, M, heads * d]`: float. `has_native_attention`
    says whether there is a kernel for it, which takes bfloat16 and an even `d`.
    """
    if _direct(query):
        checks.attention_codes(query, key, value, heads, grid)
        return cpu.attention_codes(query, key, value, heads, grid)
    return torch.ops.stepquant.attention_codes(query, key, value, heads, *grid_values(grid))


@torch.compiler.assume_constant_result
def has_native_attention() -> bool:
    """Whether this machine has a native kernel for `attention_codes`."""
    library = native.library()
    return library is not None and library.attention is not None


def _direct(x: Tensor) -> bool:
    """Whether to skip the dispatcher: eager code with a real tensor of the CPU."""
    return not is_compiling() and type(x) is Tensor and x.is_cpu
