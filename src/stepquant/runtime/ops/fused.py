"""Fused kernels for the operations between integer layers: floats in, codes out, in one pass.

Each function is an operator of `torch.library`, `torch.ops.stepquant.<its name>`
(`ops.operators`), so `torch.compile` and `torch.export` see one node. Eager calls on the CPU skip
the dispatcher, which takes as long as a small image (docs/explanation/runtime.md), and call
`ops.cpu`: native kernels that read each value once or twice instead of ten times, or as a fallback
the torch operations of `ops.plain`. Other devices run the kernels registered for them, or
`ops.plain`.

All implementations compute in float32. Their codes differ only if the value before rounding is a
tie, up to the last bits of a float; without a norm or an activation, the codes are identical.

All functions are forward only, because codes have no gradient. They raise StepQuantError for
mismatched shapes and unknown activations.
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

    Args:
        parts: Float images `[B, C_i, H, W]`, with `C` channels in all; groups may span parts. The
            kernels read channels-last parts in place and copy others.
        added: Float `[B, C]`, the same for all pixels, or None.
        groups: The number of groups.
        weight: Float `[C]`, or None.
        bias: Float `[C]`, or None.
        eps: Added to the variance.
        activation: "none" or "silu".
        outputs: The images to write; several may use the same channels.

    Returns:
        For each output, uint8 `[B, channels, H + 2 ph, W + 2 pw]`, channels last, as `encode`
        returns for the output's channels.
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
    """Codes of `y = activation(x)`: `clamp(round(y * (1 / scale)) + zero_point, 0, largest)`.

    Args:
        x: Float of any shape; `[B, C, H, W]` is an image.
        activation: "none", "silu", "gelu" or "gelu_tanh".
        output_grid: The grid of the codes. If it has factors, `y` is multiplied by them first.
        padding: For images, rows above and below and columns left and right, filled with the zero
            point; (0, 0) for all other inputs.

    Returns:
        uint8. Images are padded and channels last; other results are contiguous, of the shape of
        `x`.
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

    Args:
        x: Float `[B, ..., C]`; the norm is over `C`.
        weight: Float `[C]`, or None.
        bias: Float `[C]`, or None.
        eps: Added to the variance.
        scale: Float `[B, C]`, the same for all tokens of a sample, or None.
        shift: Float `[B, C]`, the same for all tokens of a sample, or None.
        grids: The grids of the codes, one for each result.
    """
    if _direct(x):
        checks.layer_norm_encode(x, weight, bias, eps, scale, shift, grids)
        return cpu.layer_norm_encode(x, weight, bias, eps, scale, shift, grids)
    return torch.ops.stepquant.layer_norm_encode(
        x, weight, bias, eps, scale, shift, *grid_lists(grids)
    )  # fmt: skip


def gated_encode(x: Tensor, gate_activation: str, output_grid: Grid) -> Tensor:
    """Codes of `first * activation(second)`, where `first` and `second` are the halves of `x`.

    `x`: float `[..., 2 C]`; the result is uint8 `[..., C]`. `gate_activation`: as in `encode`.
    """
    if _direct(x):
        checks.gated_encode(x, gate_activation, output_grid)
        return cpu.gated_encode(x, gate_activation, output_grid)
    return torch.ops.stepquant.gated_encode(x, gate_activation, *grid_values(output_grid))


def epilogue(
    grid: Grid, sums: Tensor, bias: Tensor | None, step_bias: Tensor | None, add_share: bool
) -> tuple[Tensor, Tensor]:
    """The activation scale and the total bias of an integer layer's call.

    The total bias is `bias + step_bias[row] - scale * zero_point * sums`. Terms that are None are
    left out.

    Args:
        grid: The activation grid.
        sums: float32 `[C_out]`, the sums of the dequantized weight over each out-channel.
        bias: float32 `[C_out]`, or None.
        step_bias: float32 `[T, C_out]`, or None.
        add_share: Whether to add the zero point's share, the last term.

    Returns:
        Scale `[1]` and bias `[C_out]`, both float32.
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
    """An integer layer's result for `codes` on `grid`, times `gate`, plus `added`.

    Integer sums are exact; they are rounded once to float32, and once to `dtype`.

    Args:
        codes: uint8 `[B, C, H + 2 ph, W + 2 pw]`, channels last and padded with the zero point, or
            `[..., C]` for linear layers.
        grid: The activation grid.
        weight: The weight in the layout of `native.tiles`, with the layer's biases.
        spec: The layer's spec.
        added: float32 or bfloat16 in the result's shape, or None.
        overwrite: Whether eager calls may write the result to `added`.
        dtype: The dtype of the result.
        gate: Float `[B, C_out]`, the same for all pixels or tokens of a sample, or None.
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
    """Codes of `activation(y)` on `output_grid`, where `y` is a linear layer's result for `codes`.

    The native kernel keeps the float32 values of `y` out of memory. `native.tiles.fits_in_tiles`
    says which layers are supported.

    Args:
        codes: uint8 `[..., C_in]`.
        grid: The activation grid of `codes`.
        weight: As in `tiled_product`.
        spec: The layer's spec.
        activation: As in `encode`.
        gated: Encode the first half of the channels of `y` times the activation of the second
            half, as `gated_encode` does.
        output_grid: The grid of the returned codes.

    Returns:
        uint8 `[..., C_out]`, or half of these channels if `gated`.
    """
    if _direct(codes):
        return cpu.tiled_product_codes(codes, grid, weight, spec, activation, gated, output_grid)
    return torch.ops.stepquant.tiled_product_codes(
        *(codes, *grid_values(grid), *product_values(weight, spec, padding=(0, 0))),
        *(activation, gated, *grid_values(output_grid)),
    )


def attention_codes(query: Tensor, key: Tensor, value: Tensor, heads: int, grid: Grid) -> Tensor:
    """Codes of `softmax(Q K^T / sqrt(d)) V`, computed per head: uint8 `[B, N, heads * d]`.

    `query`: float `[B, N, heads * d]`. `key`, `value`: float `[B, M, heads * d]`. If
    `has_native_attention()`, a native kernel runs operands that are bfloat16 with an even `d`.
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
    """Whether to skip the dispatcher: in eager code, for a plain tensor on the CPU."""
    return not is_compiling() and type(x) is Tensor and x.is_cpu
