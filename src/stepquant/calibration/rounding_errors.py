"""Rounding errors of the weights and inputs of layers, at any number of bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.ranges import search_activation_range
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.models.hooks import hooked
from stepquant.numerics import fake_quantize, range_to_grid
from stepquant.quantizers import QuantLayer
from stepquant.quantizers.weight import GridSearch

SEARCHED = 1024  # largest number of values of an input part that a range search uses
SHRINK = torch.linspace(1.0, 0.2, 9)

# bits -> (scale [N], zero point [N]) of each input part, for N samples
InputGrids = dict[int, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def weight_error(layer: QuantLayer, bits: int, find: GridSearch) -> Tensor:
    """Return the rounding error of the weight of `layer` at `bits` bits, `[C_out, C_in, ...]`.

    The error is the rounded weight minus the weight. `find` chooses the grid of each input part.
    """
    errors = []
    for part in layer.weight_parts():
        rows = part.flatten(1)
        scale, zero = find(rows, bits)
        rounded = fake_quantize(rows, scale[:, None], zero[:, None], bits, halves=True)
        errors.append((rounded - rows).view_as(part))
    return torch.cat(errors, dim=1)


@torch.no_grad()
def input_grids(
    model: nn.Module, layers: dict[str, QuantLayer], data: Trajectories, widths: range, method: str
) -> dict[str, InputGrids]:
    """Return grids for the input of each of `layers`, modules of `model`, by layer name.

    There is one grid for each sample of `data`, input part and number of bits in `widths`. The
    method "minmax" uses the extremes of the input part. The method "mse" searches on the extremes
    and at most `SEARCHED` evenly spaced values.
    """
    seen: dict[str, list[list[Tensor]]] = {name: [] for name in layers}
    now: dict[str, list[Tensor]] = {}

    def look(name: str, args: tuple[Tensor, ...], _: dict[str, Any]) -> None:
        found = []
        for part in layers[name].input_parts(args[0]):
            flat = part.reshape(-1)
            ends = torch.stack([flat.amin(), flat.amax()])
            found.append(torch.cat([ends, flat[:: -(-flat.numel() // SEARCHED)]]))
        now[name] = found  # the last call's, if the model uses a layer twice

    with hooked(layers, before=look):
        for index in range(len(data)):
            predict(model, data.take(slice(index, index + 1)))
            for name, found in now.items():
                seen[name].append(found)
    grids: dict[str, InputGrids] = {}
    for name, samples in seen.items():
        parts = [torch.stack(part) for part in zip(*samples, strict=True)]  # each [N, 2 + n]
        grids[name] = {bits: [_grid(values, bits, method) for values in parts] for bits in widths}
    return grids


def _grid(values: Tensor, bits: int, method: str) -> tuple[Tensor, Tensor]:
    """Return a grid for each row of `values [N, 2 + n]`; a row starts with its two extremes."""
    low, high = values[:, 0], values[:, 1]
    if method == "minmax":
        return range_to_grid(low, high, bits)
    return search_activation_range(values, low, high, bits, factors=SHRINK)


@torch.no_grad()
def input_errors(layer: QuantLayer, grids: InputGrids, samples: Tensor, x: Tensor) -> list[Tensor]:
    """Return the rounding errors of the layer's inputs `x [B, ...]`, one for each entry of `grids`.

    An entry holds the grids at one number of bits. `samples [B]` holds the sample numbers of the
    rows of `x`. Each error has the shape of `x`, in the units of `x` before the in-channels are
    scaled.
    """
    errors = []
    for bits, grid in grids.items():
        parts = []
        for part, (scale, zero_point) in zip(layer.input_parts(x), grid, strict=True):
            shape = (-1, *(1,) * (part.dim() - 1))
            s, z = scale[samples].view(shape), zero_point[samples].view(shape)
            parts.append(fake_quantize(part, s, z, bits) - part)
        errors.append(layer.unscaled_input(torch.cat(parts, dim=layer.channel_dim)))
    return errors
