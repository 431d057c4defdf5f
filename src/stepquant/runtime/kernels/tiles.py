"""The layout of weights that the native kernel reads (`ops/native/tiles.h`, `weights.h`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from stepquant.runtime.ops.layer_spec import LayerSpec

CHUNK, TILE, GROUP = 64, 16, 4


def tiles_of(weight: Tensor, spec: LayerSpec) -> Tensor:
    """int8 `[tiles, chunks, 16, 16, 4]`: 16 out-channels, and 64 columns in groups of four.

    A column is a tap's in-channel, taps first; zeros fill the last tile and chunk. Where the
    weights of each out-channel span no more than 4 bits, the tiles are uint8 `[tiles, bytes]`, half
    as large, and the kernel unpacks what it is about to read.
    """
    rows = weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight
    missing = (-spec.columns % CHUNK, -spec.out_channels % TILE)
    rows = functional.pad(rows, (0, missing[0], 0, missing[1]))
    tiles = rows.view(-1, TILE, rows.shape[1] // CHUNK, CHUNK // GROUP, GROUP)
    tiles = tiles.permute(0, 2, 3, 1, 4).contiguous()
    lowest = rows.amin(dim=1)
    fits = (rows.amax(dim=1).to(torch.int16) - lowest <= 15).all()
    return _halved(tiles, lowest) if fits else tiles


def weight_in(tiles: Tensor, spec: LayerSpec) -> Tensor:
    """The weight that `tiles_of` was given, bit for bit."""
    tiles = _doubled(tiles) if tiles.dtype is torch.uint8 else tiles
    rows = tiles.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1)
    rows = rows[: spec.out_channels, : spec.columns]
    if spec.kind == "linear":
        return rows
    by_taps = rows.reshape(spec.out_channels, *spec.kernel_size, spec.in_channels)
    return by_taps.permute(0, 3, 1, 2)


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
