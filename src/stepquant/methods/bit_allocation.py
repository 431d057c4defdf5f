"""Bit allocation: mixed precision by sensitivity, over the whole model, at the scheme's mean.

No paper's step; it follows layer-wise works such as HAQ and HAWQ. Activations get bits layer by
layer. Weights get bits out-channel by out-channel: the runtime stores each at its own density.

Rounding adds an error `e` to a weight or an input. To the first order it moves the prediction by
`J e`, and the image by `v · J e`, where `v` is the image's gradient by the prediction
(`calibration.influence`). What the steps `t` of one image add is summed before it is squared:

    E = (sum over t of v_t · J_t e_t)^2

Errors of different layers are taken as independent. The allocation minimises the sum of `E` for a
given number of bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepquant.calibration.influence import check_without_memory
from stepquant.calibration.initialize import weight_search
from stepquant.calibration.rounding_errors import input_errors, input_grids, weight_error
from stepquant.calibration.sensitivity import OutputErrors, output_errors
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.methods.outlier_mixed_bits import BITS_CHOSEN
from stepquant.methods.session import Session
from stepquant.methods.step import Step, register_step
from stepquant.models.adapter import DenoiserAdapter
from stepquant.quantizers import QuantLayer
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError


def allocate_bits(
    errors: list[Tensor], columns: list[int], widths: range, budget: int
) -> list[Tensor]:
    """Bits of each out-channel that cost at most `budget` bits in all.

    Every channel starts with the fewest bits. Increments are then taken in the order of the error
    that they save per bit, along the lower convex hull of each channel's errors, as long as they
    fit. If no increment is left out for lack of room, no other allocation of the same cost has a
    lower sum of errors.

    Args:
        errors: For each layer, the error of each out-channel at each width, `[len(widths), C_out]`.
        columns: For each layer, the number of weights per out-channel.
        widths: Bits to choose from, ascending.
        budget: Bits of all weights together.

    Returns:
        uint8 `[C_out]` for each layer.
    """
    steps: list[tuple[float, int, int, int, int]] = []  # (-gain, layer, channel, from, to)
    for number, table in enumerate(errors):
        exact = table.double().T.numpy()  # [C_out, widths]
        for channel, row in enumerate(exact):
            gain = np.inf
            for start, stop in hull_segments(row):
                # Never more than the increment before, even by rounding: that one must come first.
                gain = min(gain, (row[start] - row[stop]) / ((stop - start) * columns[number]))
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
    """Segments `(from, to)` of the falling part of the lower convex hull of `errors [widths]`.

    Both are indices into `errors`.
    """
    corners = [0]
    while corners[-1] + 1 < len(errors):
        here = corners[-1]
        ahead = np.arange(here + 1, len(errors))
        slopes = (errors[ahead] - errors[here]) / (ahead - here)
        if slopes.min() >= 0:
            break
        # Of slopes that differ only by rounding, take the nearest: a longer jump may not fit.
        best = int((slopes <= slopes.min() * (1 - 1e-12)).argmax())
        corners.append(int(ahead[best]))
    return list(itertools.pairwise(corners))


@register_step
class BitAllocation(Step):
    """Choose the weight bits of every out-channel and the activation bits of every layer.

    The mean over all weights is at most the scheme's weight bits. The mean over all values that
    layers read is at most its activation bits. Layers whose bits lie outside the limits below stay
    as they are, and so do those of 8 bits (as input and output have).

    Attributes:
        of: What is allocated: "weights", "activations", or "both".
        errors_of: "image" counts the squared change of the image with which the float model's
            sampler ends (`image_gradients`). "prediction" counts the relative squared change of the
            prediction at each step.
        fewest_weight_bits: Fewest bits of an out-channel.
        most_weight_bits: Most bits of an out-channel.
        fewest_activation_bits: Fewest bits of a layer's input.
        most_activation_bits: Most bits of a layer's input.
        samples: Calibration inputs that errors are measured on.
    """

    name = "bit_allocation"
    needs_ranges = False
    not_after: ClassVar[Mapping[str, str]] = {"outlier_mixed_bits": BITS_CHOSEN}
    of: Literal["both", "weights", "activations"] = "both"
    errors_of: Literal["image", "prediction"] = "image"
    fewest_weight_bits: int = Field(1, ge=1, le=6)
    most_weight_bits: int = Field(6, ge=1, le=6)
    fewest_activation_bits: int = Field(2, ge=1, le=8)
    most_activation_bits: int = Field(8, ge=1, le=8)
    samples: int = Field(800, ge=1)

    @model_validator(mode="after")
    def _in_order(self) -> BitAllocation:
        for kind, widths in self._widths().items():
            if len(widths) == 0:
                raise StepQuantError(
                    f"fewest_{kind}_bits of step '{self.name}' is {widths.start}: expected at most "
                    f"the {widths.stop - 1} of most_{kind}_bits"
                )
        return self

    @property
    def needs_influence(self) -> bool:
        """True if the errors are those of the image."""
        return self.errors_of == "image"

    def check(self, scheme: Scheme) -> None:
        """Check the scheme's bits against the settings.

        Raises:
            StepQuantError: The scheme has fewer bits than the fewest that this step may choose.
        """
        for kind, bits in (("weight", scheme.weight_bits), ("activation", scheme.activation_bits)):
            fewest = self._widths()[kind].start
            if bits < fewest and self.of in ("both", f"{kind}s"):
                raise StepQuantError(
                    f"step '{self.name}' got {bits} {kind} bits: expected at least {fewest}, as "
                    f"its setting fewest_{kind}_bits says"
                )

    def check_model(self, model: nn.Module, adapter: DenoiserAdapter, scheduler: Any) -> None:
        """Check that the sampler allows the image's errors to be traced, where these count.

        Raises:
            StepQuantError: `errors_of` is "image", and a step of `scheduler` depends on more than
                its own input (any other than DDIM and DDPM).
        """
        if self.errors_of == "image":
            check_without_memory(scheduler)

    def apply(self, session: Session) -> None:
        """Allocate; the summary has each layer's bits and expected errors.

        If no layer's bits may change, the model stays as it is, and the reporter says so.

        Raises:
            StepQuantError: An earlier step has initialised the ranges.
        """
        session.require_no_ranges(self.name)
        layers = session.layers()
        widths = self._widths()
        weighed = [n for n, q in layers.items() if q.weight_bits in widths["weight"]]
        read = [
            n for n, q in layers.items() if q.activation_bits in set(widths["activation"]) - {8}
        ]
        weighed = [] if self.of == "activations" else weighed
        read = [] if self.of == "weights" else read
        if not weighed and not read:
            session.reporter.line(f"step '{self.name}' finds no layer whose bits it may change")
            session.summary[self.name] = {}
            return
        errors = self._measured(session, layers, weighed, read)
        columns = [layers[name].weight[0].numel() for name in weighed]
        sizes = [errors.sizes[name] for name in read]
        of_weights = allocate_bits(
            [errors.weights[name] for name in weighed],
            columns,
            widths["weight"],
            sum(layers[name].weight.numel() * layers[name].weight_bits for name in weighed),
        )
        of_inputs = allocate_bits(
            [errors.inputs[name][:, None] for name in read],
            sizes,
            widths["activation"],
            sum(layers[name].activation_bits * errors.sizes[name] for name in read),
        )
        session.summary[self.name] = {
            "weights": [
                _weights_record(name, layers[name], bits, errors.weights[name], widths["weight"])
                for name, bits in zip(weighed, of_weights, strict=True)
            ],
            "mean_weight_bits": _mean(of_weights, columns),
            "activations": [
                _inputs_record(layers[name], name, int(bits), errors, widths["activation"])
                for name, bits in zip(read, of_inputs, strict=True)
            ],
            "mean_activation_bits": _mean(of_inputs, sizes),
        }
        for name, bits in zip(weighed, of_weights, strict=True):
            layers[name].set_channel_bits(bits)
        for name, bits in zip(read, of_inputs, strict=True):
            layers[name].set_activation_bits(int(bits))

    def _widths(self) -> dict[str, range]:
        return {
            "weight": range(self.fewest_weight_bits, self.most_weight_bits + 1),
            "activation": range(self.fewest_activation_bits, self.most_activation_bits + 1),
        }

    def _samples(self, session: Session) -> tuple[Trajectories, Tensor]:
        """Inputs spread over the steps, and for each the gradient `v` by its prediction.

        With `errors_of: prediction`, `v` has random signs over the norm of the prediction, and each
        input counts alone.
        """
        if self.errors_of == "prediction":
            data = session.trajectories.subset(self.samples, session.seed)
            alone = torch.arange(len(data))  # no sum over steps: each prediction counts alone
            data = replace(data, trajectory=alone)
            generator = torch.Generator().manual_seed(session.seed)
            with torch.no_grad():
                y = predict(session.float_model, data)
            signs = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1.0
            return data, signs / y.flatten(1).norm(dim=1).view(-1, *(1,) * (y.dim() - 1))
        found = session.image_gradients()  # v: [T, images, C, H, W]
        steps = found.shape[0]
        images = min(found.shape[1], max(1, self.samples // steps))
        by_step = [session.trajectories.rows(row, images) for row in range(steps)]
        index = torch.stack(by_step).transpose(0, 1).flatten()  # image by image
        image = torch.arange(images).repeat_interleave(steps)
        data = replace(session.trajectories.take(index), trajectory=image)
        return data, found[:, :images].transpose(0, 1).flatten(0, 1)

    def _measured(
        self, session: Session, layers: dict[str, QuantLayer], weighed: list[str], read: list[str]
    ) -> OutputErrors:
        """Errors of the layers `weighed` and `read` at all widths; the work folder keeps them."""
        kept = session.work.load(self.name)
        if kept is not None:
            return OutputErrors(
                {name: kept[f"weights/{name}"] for name in weighed},
                {name: kept[f"inputs/{name}"] for name in read},
                {name: int(kept[f"sizes/{name}"]) for name in read},
            )
        find, method = weight_search(session.weight_ranges), session.activation_ranges
        widths = self._widths()
        data, gradients = self._samples(session)
        grids = input_grids(
            session.model, {name: layers[name] for name in read}, data, widths["activation"], method
        )
        errors = output_errors(
            session.model,
            {name: layer for name, layer in layers.items() if name in {*weighed, *read}},
            data,
            gradients,
            {
                name: [weight_error(layers[name], bits, find) for bits in widths["weight"]]
                for name in weighed
            },
            {name: partial(input_errors, layers[name], grids[name]) for name in read},
            session.reporter,
        )
        tensors = {f"weights/{name}": table for name, table in errors.weights.items()}
        tensors |= {f"inputs/{name}": table for name, table in errors.inputs.items()}
        tensors |= {f"sizes/{name}": torch.tensor(size) for name, size in errors.sizes.items()}
        session.work.save(self.name, tensors)
        return errors


def _mean(chosen: list[Tensor], costs: list[int]) -> float | None:
    """Mean bits; each entry of `chosen[i]` counts `costs[i]` times. None without entries."""
    count = sum(bits.numel() * cost for bits, cost in zip(chosen, costs, strict=True))
    used = sum(int(bits.sum()) * cost for bits, cost in zip(chosen, costs, strict=True))
    return used / count if count else None


def _weights_record(
    name: str, layer: QuantLayer, bits: Tensor, errors: Tensor, widths: range
) -> dict[str, Any]:
    """Summary record of one layer's weights."""
    levels, channels = bits.unique(return_counts=True)
    return {
        "layer": name,
        "channels": {str(b): n for b, n in zip(levels.tolist(), channels.tolist(), strict=True)},
        "mean_bits": float(bits.float().mean()),
        "uniform_error": float(errors[layer.weight_bits - widths.start].sum()),
        "error": float(errors.gather(0, bits[None].long() - widths.start).sum()),
    }


def _inputs_record(
    layer: QuantLayer, name: str, bits: int, errors: OutputErrors, widths: range
) -> dict[str, Any]:
    """Summary record of one layer's input."""
    table = errors.inputs[name]
    return {
        "layer": name,
        "bits": bits,
        "values": errors.sizes[name],
        "uniform_error": float(table[layer.activation_bits - widths.start]),
        "error": float(table[bits - widths.start]),
    }
