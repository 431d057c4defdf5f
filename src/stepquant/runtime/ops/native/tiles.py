"""The weight layout of the native integer products: tiles of 16 out-channels (`tiles.h`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError

CHUNK, TILE, GROUP = 64, 16, 4  # columns of a chunk, out-channels of a tile, columns of a group


def lay_out(weight: Tensor, spec: LayerSpec) -> Tensor:
    """Lay out an int8 `weight [C_out, C_in, kh, kw]` (or `[C_out, C_in]`) in tiles.

    The result is int8 `[tiles, chunks, 16, 16, 4]`: each tile has 16 out-channels, each chunk 64
    columns as 16 groups of four. A column is one in-channel of one tap, with taps outermost.
    Partial tiles and chunks are filled up with zeros.

    If the weights of each out-channel span at most 4 bits, the result is uint8 `[tiles, bytes]`
    instead, about half as large (`native/weights.h` describes it). The kernel unpacks it as it
    reads.
    """
    rows = weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight
    missing = (-spec.columns % CHUNK, -spec.out_channels % TILE)
    rows = functional.pad(rows, (0, missing[0], 0, missing[1]))
    tiles = rows.view(-1, TILE, rows.shape[1] // CHUNK, CHUNK // GROUP, GROUP)
    tiles = tiles.permute(0, 2, 3, 1, 4).contiguous()
    lowest = rows.amin(dim=1)
    fits = (rows.amax(dim=1).to(torch.int16) - lowest <= 15).all()
    return _halved(tiles, lowest) if fits else tiles


def differences(laid_out: Tensor, spec: LayerSpec) -> Tensor:
    """The int8 weight that `lay_out` was given, bit for bit."""
    laid_out = _doubled(laid_out) if laid_out.dtype is torch.uint8 else laid_out
    rows = laid_out.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
    rows = rows[: spec.out_channels, : spec.columns]
    if spec.kind == "linear":
        return rows
    by_taps = rows.reshape(spec.out_channels, *spec.kernel_size, spec.in_channels)
    return by_taps.permute(0, 3, 1, 2)


def fits_in_tiles(spec: LayerSpec, gated: bool) -> bool:
    """Whether the kernel can write codes for a layer with this spec.

    It needs a linear layer with whole tiles of out-channels, or pairs of tiles if `gated`.
    """
    return spec.kind == "linear" and spec.out_channels % ((2 if gated else 1) * TILE) == 0


def check(laid_out: Tensor, spec: LayerSpec) -> None:
    """Raise StepQuantError if `laid_out` is not the layout of a layer with this spec."""
    tiles, chunks = -(-spec.out_channels // TILE), -(-spec.columns // CHUNK)
    whole = (tiles, chunks, CHUNK // GROUP, TILE, GROUP)
    halved = (tiles, TILE * GROUP + chunks * CHUNK * TILE // 2)
    expected = halved if laid_out.dtype is torch.uint8 else whole
    if laid_out.dtype not in (torch.int8, torch.uint8) or laid_out.shape != expected:
        raise StepQuantError(
            f"a tiled weight is {laid_out.dtype} {tuple(laid_out.shape)}: expected int8 "
            f"{whole} or uint8 {halved} for {spec.out_channels} out-channels of {spec.columns} "
            "columns"
        )


def _halved(tiles: Tensor, lowest: Tensor) -> Tensor:
    """`tiles` in 4 bits, preceded by the `lowest` int8 value of each out-channel."""
    head = lowest.view(-1, TILE, 1).expand(-1, TILE, GROUP)  # [tiles, 16, 4]
    codes = (tiles - head[:, None, None]).view(torch.uint8).flatten(3)  # [tiles, chunks, 16, 64]
    body = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    return torch.cat([head.flatten(1).view(torch.uint8), body.flatten(1)], dim=1)


def _doubled(halved: Tensor) -> Tensor:
    """The inverse of `_halved`: int8 tiles."""
    head = halved[:, : TILE * GROUP].view(torch.int8).view(-1, 1, 1, TILE, GROUP)
    body = halved[:, TILE * GROUP :].view(len(halved), -1, CHUNK // GROUP // 2, TILE * GROUP)
    codes = torch.stack([body & 15, body >> 4], dim=3).flatten(2, 3)
    return codes.view(torch.int8).unflatten(3, (TILE, GROUP)) + head
