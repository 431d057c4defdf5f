"""Outlier-driven Mixed Quantization (OMQ): MPQ-DM (AAAI 2025, arXiv 2412.11549).

Out-channels whose weights have outliers get one bit more, as many others one bit less, so that the
mean stays what the scheme says. How many, is searched layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepquant.calibration.block_inputs import capture_inputs, execution_order
from stepquant.calibration.initialize import weight_search
from stepquant.calibration.trajectories import Trajectories
from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, TRAINING, Step, register_step
from stepquant.quantizers import QuantLayer
from stepquant.quantizers.weight import GridSearch
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError

BITS_CHOSEN = "which has chosen the bits that it would replace"


def kurtosis(weight: Tensor) -> Tensor:
    """Kurtosis `E[(w - mean)^4] / variance^2` of each out-channel, `[C_out]` (a normal has 3)."""
    rows = weight.detach().flatten(1).double()
    centred = rows - rows.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1)
    return (centred.pow(4).mean(dim=1) / variance.square().clamp(min=1e-30)).float()


def allocate(raising: Tensor, lowering: Tensor, bits: int, raised: int, lowered: int) -> Tensor:
    """Bits of each out-channel, uint8 `[C_out]`.

    The `raised` channels that are largest in `raising [C_out]` get `bits + 1`; of the others the
    `lowered` ones that are smallest in `lowering [C_out]` get `bits - 1`; the rest gets `bits`.
    """
    allocated = torch.full_like(raising, bits, dtype=torch.uint8)
    allocated[torch.argsort(raising, descending=True, stable=True)[:raised]] = bits + 1
    upwards = torch.argsort(lowering, stable=True)
    allocated[upwards[allocated[upwards] == bits][:lowered]] = bits - 1
    return allocated


@register_step
class OutlierMixedBits(Step):
    """Give out-channels one bit more or less by how salient they are, at the same mean.

    A layer's out-channels are ranked by `selection`: the kurtosis of their weights after any
    scaling before (the paper's), their mean magnitude, at random, or by the measured error: raised
    where a bit more gains most, lowered where a bit less costs least (no paper's). A group is one
    of `groups` equal parts of the channels; for each `j` from 0 to `groups / 2` the first `j`
    groups get one bit more and the last `j` one less, and the `j` is kept that brings the quantized
    layer closest to the float one on `samples` calibration inputs, with quantized activations and
    with the layers before it quantized already. `extra_groups` get a bit more on top of that
    (MPQ-DM+: 1), which raises the mean by `extra_groups / groups` bits.

    Layers of 8 bits (input and output) or of 1, and layers with fewer than `groups` out-channels,
    stay as they are; the summary says of each why. One bit is a grid of two levels.

    Deviations: the released code searches `j` in 0 and 1 only and leaves activations unquantized in
    the search; this is the search as printed, on the very grids that the layer then keeps. What
    MPQ-DM+ does is not in the released code; one group that nothing pays for agrees with its
    reported size.
    """

    name = "outlier_mixed_bits"
    not_after: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            TRAINING, "which has trained the weights on the grids that it would replace"
        ),
        "low_rank_adapters": "which has begun its adapters on the grids that it would replace",
        "bit_allocation": BITS_CHOSEN,
        **CORRECTED,
    }
    groups: int = Field(10, ge=2)
    extra_groups: int = Field(0, ge=0)
    selection: Literal["kurtosis", "magnitude", "random", "error"] = "kurtosis"
    samples: int = Field(64, ge=1)

    def check(self, scheme: Scheme) -> None:
        """At least two bits, and at most seven."""
        if not 2 <= scheme.weight_bits <= 7:
            raise StepQuantError(
                f"step '{self.name}' got {scheme.weight_bits} weight bits: expected 2 to 7, "
                "because some out-channels get one bit less and some one more"
            )
        if self.extra_groups > self.groups:
            raise StepQuantError(
                f"extra_groups of step '{self.name}' is {self.extra_groups}: expected at most "
                f"groups ({self.groups})"
            )

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Mix the bits of all layers; the summary has counts and errors of each, or why not."""
        session.ensure_ranges()
        layers = session.layers()
        kept = session.work.load(self.name)
        if kept is not None:
            errors = {
                name: kept.pop(f"errors/{name}") for name in layers if f"errors/{name}" in kept
            }
            session.model.load_state_dict(kept)
        else:
            errors = self._mix_all(session)
            state = dict(session.model.state_dict())
            session.work.save(self.name, state | {f"errors/{n}": e for n, e in errors.items()})
        uniform = {
            name: reason
            for name, layer in layers.items()
            if (reason := self._why_uniform(layer)) is not None
        }
        small = [name for name in uniform if self._is_small(layers[name])]
        if small:
            session.reporter.line(
                f"bits stay uniform where a layer has fewer than {self.groups} out-channels: "
                f"{', '.join(small)}"
            )
        session.summary[self.name] = {
            "layers": [
                _record(name, layers[name], errors[name]) for name in layers if name in errors
            ],
            "uniform_layers": uniform,
        }

    def _is_small(self, layer: QuantLayer) -> bool:
        return layer.out_channels < self.groups

    def _why_uniform(self, layer: QuantLayer) -> str | None:
        """Why the bits of `layer` are not mixed, or None."""
        if layer.weight_bits not in range(2, 8):
            return f"weight bits {layer.weight_bits}: no channel could have one bit less and more"
        if self._is_small(layer):
            return f"{layer.out_channels} out-channels: fewer than the {self.groups} groups"
        return None

    def _mix_all(self, session: Session) -> dict[str, Tensor]:
        data = session.trajectories.subset(self.samples, session.seed)
        layers = session.layers()
        order = execution_order(session.model, list(layers), data)
        generator = torch.Generator().manual_seed(session.seed)
        errors = {}
        with session.reporter.task("mixing bits", total=len(order)) as task:
            for name in order:
                layer = layers[name]
                if self._why_uniform(layer) is None:
                    errors[name] = self._mix(session, name, layer, data, generator)
                task.advance(note=name)
        return errors

    def _mix(
        self,
        session: Session,
        name: str,
        layer: QuantLayer,
        data: Trajectories,
        generator: torch.Generator,
    ) -> Tensor:
        """Give `layer` its best bits; the relative error of each `j`, `[candidates]`."""
        args, _ = capture_inputs(session.model, name, data, len(data))
        session.context.set_timestep(data.timestep)
        widths = (layer.weight_bits - 1, layer.weight_bits, layer.weight_bits + 1)
        errors, grids = channel_errors(layer, args[0], widths, weight_search(session.weight_ranges))
        raising, lowering = self._salience(layer, errors, generator)
        group = layer.out_channels // self.groups
        candidates = [
            allocate(
                raising, lowering, layer.weight_bits, (j + self.extra_groups) * group, j * group
            )
            for j in range((self.groups - self.extra_groups) // 2 + 1)
        ]
        # An out-channel's result depends on its own weights only, so that errors add up.
        found = torch.stack(
            [sum_over_bits(errors, candidate, layer.weight_bits) for candidate in candidates]
        )
        set_bits(layer, candidates[int(found.argmin())], grids)
        return found

    def _salience(
        self, layer: QuantLayer, errors: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """What channels are raised by and lowered by, each `[C_out]`."""
        if self.selection == "error":
            return errors[1] - errors[2], errors[0] - errors[1]
        if self.selection == "kurtosis":
            salience = kurtosis(layer.weight)
        elif self.selection == "magnitude":
            salience = layer.weight.detach().flatten(1).abs().mean(dim=1)
        else:
            salience = torch.rand(layer.out_channels, generator=generator)
        return salience, salience


# bits -> (scale [C_out], zero point [C_out]) of each part
Grids = dict[int, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def channel_errors(
    layer: QuantLayer, x: Tensor, widths: Sequence[int], find: GridSearch
) -> tuple[Tensor, Grids]:
    """Squared error of each out-channel at each of `widths` bits, `[len(widths), C_out]`.

    Against the float layer on the input `x`, with quantized activations; relative to the power of
    the whole output. Also the grids of each width. Leaves the layer with the last of them.
    """
    others = [d for d in range(x.dim()) if d != layer.channel_dim % x.dim()]
    layer.quantizing = False
    target = layer(x)
    layer.quantizing = True
    power = target.square().mean(dim=others).sum().clamp(min=1e-12)
    errors: list[Tensor] = []
    grids: Grids = {}
    for bits in widths:
        layer.set_channel_bits(torch.full((layer.out_channels,), bits))
        layer.fit_weights(find)
        grids[bits] = [
            (weights.scale.detach().clone(), weights.zero_point.clone())
            for _, weights, _ in layer.parts()
        ]
        errors.append((layer(x) - target).square().mean(dim=others) / power)
    return torch.stack(errors), grids


@torch.no_grad()
def set_bits(layer: QuantLayer, channel_bits: Tensor, grids: Grids) -> None:
    """Give each out-channel of `layer` its bits, `[C_out]`, and the grid found for these."""
    layer.set_channel_bits(channel_bits)
    for index, (_, weights, _) in enumerate(layer.parts()):
        for bits, fitted in grids.items():
            members = channel_bits == bits
            weights.scale[members] = fitted[index][0][members]
            weights.zero_point[members] = fitted[index][1][members]


def sum_over_bits(errors: Tensor, channel_bits: Tensor, bits: int) -> Tensor:
    """The error of a whole layer: of each out-channel the row `errors [3, C_out]` of its bits."""
    rows = channel_bits.long() - (bits - 1)
    return errors.gather(0, rows[None]).sum()


def _record(name: str, layer: QuantLayer, errors: Tensor) -> dict[str, Any]:
    levels, channels = layer.channel_bits.unique(return_counts=True)
    return {
        "layer": name,
        "channels": {str(b): n for b, n in zip(levels.tolist(), channels.tolist(), strict=True)},
        "mean_bits": float(layer.channel_bits.float().mean()),
        "errors": errors.tolist(),
    }
