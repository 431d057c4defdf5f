"""Weight bits where they save most error, over all out-channels of a model, at the same mean.

No paper's step: mixed precision by measured error, as layer-wise works have it (HAQ, HAWQ), down to
single out-channels, which this runtime stores at their own density.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepquant.calibration.capture import capture_inputs
from stepquant.calibration.initialize import weight_search
from stepquant.errors import StepQuantError
from stepquant.methods.outlier_mixed_bits import (
    BITS_CHOSEN,
    TRAINED_ON_GRIDS,
    Grids,
    channel_errors,
    set_bits,
)
from stepquant.methods.step import Step
from stepquant.quantizers import QuantLayer
from stepquant.scheme import Scheme
from stepquant.session import Session


def allocate_bits(
    errors: list[Tensor], columns: list[int], widths: range, budget: int
) -> list[Tensor]:
    """Bits of each out-channel, uint8 `[C_out]` for each layer, that cost at most `budget` bits.

    `errors`: of each layer `[len(widths), C_out]`, the error of each out-channel at each width;
    `columns`: weights per out-channel. Every channel starts with the fewest bits; then those steps
    to more are taken that save most error per bit, in the order of the lower convex hull of each
    channel's errors, as long as they fit. Where no step is left out for want of room, no other
    allocation of the same cost has a lower sum of errors.
    """
    steps: list[tuple[float, int, int, int, int]] = []  # (-gain, layer, channel, from, to)
    for number, table in enumerate(errors):
        exact = table.double().T.numpy()  # [C_out, widths]
        for channel, row in enumerate(exact):
            for start, stop in hull_segments(row):
                gain = (row[start] - row[stop]) / ((stop - start) * columns[number])
                steps.append((-gain, number, channel, start, stop))
    chosen = [np.zeros(table.shape[1], dtype=np.int64) for table in errors]
    left = budget - sum(
        widths[0] * table.shape[1] * cost for table, cost in zip(errors, columns, strict=True)
    )
    for _, number, channel, start, stop in sorted(steps):
        cost = (stop - start) * columns[number]
        if chosen[number][channel] == start and cost <= left:
            chosen[number][channel] = stop
            left -= cost
    return [torch.from_numpy(index + widths[0]).to(torch.uint8) for index in chosen]


def hull_segments(errors: np.ndarray) -> list[tuple[int, int]]:
    """Segments `(from, to)` of the falling part of the lower convex hull of `errors [widths]`."""
    corners = [0]
    while corners[-1] + 1 < len(errors):
        here = corners[-1]
        ahead = np.arange(here + 1, len(errors))
        slopes = (errors[ahead] - errors[here]) / (ahead - here)
        best = int(slopes.argmin())
        if slopes[best] >= 0:
            break
        corners.append(int(ahead[best]))
    return list(itertools.pairwise(corners))


class BitAllocation(Step):
    """Choose the weight bits of every out-channel, from `fewest` to `most`, for the whole model.

    The mean over all weights is at most the scheme's. An out-channel's error is that of its output
    on `samples` calibration inputs, with quantized activations, relative to the power of its
    layer's output; all layers count alike, so that layers with few weights, whose bits are cheap,
    get more of them. Errors are measured with every other layer at the scheme's bits. Layers of
    more or fewer bits than the range (input and output have 8) stay as they are.
    """

    name = "bit_allocation"
    not_after: ClassVar[Mapping[str, str]] = {**TRAINED_ON_GRIDS, "outlier_mixed_bits": BITS_CHOSEN}
    fewest: int = Field(1, ge=1, le=6)
    most: int = Field(4, ge=1, le=6)
    samples: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> BitAllocation:
        if self.fewest > self.most:
            raise StepQuantError(
                f"fewest of step '{self.name}' is {self.fewest}: expected at most the {self.most} "
                "of most"
            )
        return self

    def check(self, scheme: Scheme) -> None:
        """The scheme's bits must lie between `fewest` and `most`."""
        if not self.fewest <= scheme.weight_bits <= self.most:
            raise StepQuantError(
                f"step '{self.name}' got {scheme.weight_bits} weight bits: expected {self.fewest} "
                f"to {self.most}, as its settings fewest and most say"
            )

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Allocate; the summary has bits and errors of each layer."""
        session.ensure_ranges()
        kept = session.work.load(self.name)
        widths = range(self.fewest, self.most + 1)
        layers = {n: layer for n, layer in session.layers().items() if layer.weight_bits in widths}
        if kept is None:
            errors, grids = self._measure(session, layers, widths)
            columns = [layer.weight[0].numel() for layer in layers.values()]
            budget = sum(layer.weight.numel() * layer.weight_bits for layer in layers.values())
            chosen = allocate_bits(list(errors.values()), columns, widths, budget)
            for (name, layer), bits in zip(layers.items(), chosen, strict=True):
                set_bits(layer, bits, grids[name])
            state = dict(session.model.state_dict())
            session.work.save(self.name, state | {f"errors/{n}": e for n, e in errors.items()})
        else:
            errors = {name: kept.pop(f"errors/{name}") for name in layers}
            session.model.load_state_dict(kept)
        weights = sum(layer.weight.numel() for layer in layers.values())
        used = sum(
            int(layer.channel_bits.sum()) * layer.weight[0].numel() for layer in layers.values()
        )
        session.summary[self.name] = {
            "mean_bits": used / max(1, weights),
            "layers": [
                _record(name, layer, errors[name], widths) for name, layer in layers.items()
            ],
        }

    def _measure(
        self, session: Session, layers: dict[str, QuantLayer], widths: range
    ) -> tuple[dict[str, Tensor], dict[str, Grids]]:
        """Errors and grids of each layer; leaves the layers as they were."""
        data = session.trajectories.subset(self.samples, session.seed)
        find = weight_search(session.weight_ranges)
        errors, grids = {}, {}
        with session.reporter.task("measuring bits", total=len(layers)) as task:
            for name, layer in layers.items():
                args, _ = capture_inputs(session.model, name, data, len(data))
                session.context.set_timestep(data.timestep)
                errors[name], grids[name] = channel_errors(layer, args[0], widths, find)
                uniform = torch.full((layer.out_channels,), layer.weight_bits, dtype=torch.uint8)
                layer.set_channel_bits(uniform)
                layer.fit_weights(find)
                task.advance(note=name)
        return errors, grids


def _record(name: str, layer: QuantLayer, errors: Tensor, widths: range) -> dict[str, Any]:
    bits = layer.channel_bits.long()
    levels, channels = bits.unique(return_counts=True)
    uniform = errors[layer.weight_bits - widths[0]]
    return {
        "layer": name,
        "channels": {str(b): n for b, n in zip(levels.tolist(), channels.tolist(), strict=True)},
        "mean_bits": float(bits.float().mean()),
        "uniform_error": float(uniform.sum()),
        "error": float(errors.gather(0, bits[None] - widths[0]).sum()),
    }
