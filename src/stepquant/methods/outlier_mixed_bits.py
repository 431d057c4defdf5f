"""Outlier-driven Mixed Quantization (OMQ) of MPQ-DM (arXiv 2412.11549, AAAI 2025).

The out-channels of a layer get `N - 1`, `N` or `N + 1` bits, as many `N + 1` as `N - 1`, so the
mean stays `N`. The kurtosis of an out-channel's weights ranks the channels:

    kappa_o = E[(w - mu_o)^4] / sigma_o^4

For `j` from 0 to half of the groups, the `j` groups with the largest `kappa` get `N + 1` bits and
the `j` groups with the smallest get `N - 1`. Layer by layer, the `j` with the least

    || X W^T - Q(X) Q(W | bits)^T ||^2

is kept, on calibration inputs that the quantized layers before have produced.

Deviations:

- The released code searches only `j` of 0 and 1 and leaves activations unquantized in the search.
  This is the search as printed.
- The search uses the very grids that the layer then keeps.
- `selection: error` is no paper's. `magnitude` and `random` are there for comparison.
- The released code does not contain MPQ-DM+. Here it has one group of `N + 1` bits that nothing
  compensates (`extra_groups: 1`), which agrees with its reported size.
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
    """Kurtosis `E[(w - mean)^4] / variance^2` of each out-channel; a normal distribution has 3.

    Computed in float64 over in-channels and taps, with the biased variance.

    Args:
        weight: `[C_out, C_in, ...]`.

    Returns:
        float32 `[C_out]`; 0 for a channel of equal weights.
    """
    rows = weight.detach().flatten(1).double()
    centred = rows - rows.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1)
    return (centred.pow(4).mean(dim=1) / variance.square().clamp(min=1e-30)).float()


def allocate(raising: Tensor, lowering: Tensor, bits: int, raised: int, lowered: int) -> Tensor:
    """Bits of each out-channel, uint8 `[C_out]`.

    Args:
        raising: Salience by which channels are raised, `[C_out]`. The `raised` largest get
            `bits + 1`.
        lowering: Salience by which channels are lowered, `[C_out]`. Of the others, the `lowered`
            smallest get `bits - 1`.
        bits: Bits of all remaining channels.
        raised: Number of channels with one bit more.
        lowered: Number of channels with one bit less.
    """
    allocated = torch.full_like(raising, bits, dtype=torch.uint8)
    allocated[torch.argsort(raising, descending=True, stable=True)[:raised]] = bits + 1
    upwards = torch.argsort(lowering, stable=True)
    allocated[upwards[allocated[upwards] == bits][:lowered]] = bits - 1
    return allocated


@register_step
class OutlierMixedBits(Step):
    """Give salient out-channels one bit more and others one bit less, at the same mean.

    Some layers stay uniform: those of 8 bits (input and output), those of 1 bit, and those with
    fewer than `groups` out-channels. The summary names each with the reason. One bit is a grid of
    two levels.

    Attributes:
        groups: Number of equal parts that a layer's out-channels are divided into.
        extra_groups: Groups with one bit more that no lowered group compensates (MPQ-DM+: 1). They
            raise the mean by `extra_groups / groups` bits.
        selection: Ranking of the channels. "kurtosis" of the weights after any earlier scaling is
            the paper's. "magnitude" is their mean absolute value, and "random" ranks at random.
            "error" measures: it raises where one bit more gains most, and lowers where one bit less
            costs least.
        samples: Calibration inputs of the search.
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
        """Check the scheme's weight bits and the number of groups.

        Raises:
            StepQuantError: The scheme's weight bits are not 2 to 7, or `extra_groups` exceeds
                `groups`.
        """
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
        """Mix the bits of all layers; the summary has the counts and errors of each.

        It also names the layers that stay uniform, with the reason. The work folder keeps the
        result.
        """
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
        """Mix all layers in execution order; returns the errors of each, see `_mix`."""
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
        """Set the best bits of `layer`; returns the relative error of each `j`, `[candidates]`."""
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
        # An out-channel's result depends on its own weights only, so errors add up.
        found = torch.stack(
            [sum_over_bits(errors, candidate, layer.weight_bits) for candidate in candidates]
        )
        set_bits(layer, candidates[int(found.argmin())], grids)
        return found

    def _salience(
        self, layer: QuantLayer, errors: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Salience for raising and for lowering, each `[C_out]`.

        `errors [3, C_out]` are those at one bit less, at the layer's bits, and at one bit more.
        """
        if self.selection == "error":
            return errors[1] - errors[2], errors[0] - errors[1]
        if self.selection == "kurtosis":
            salience = kurtosis(layer.weight)
        elif self.selection == "magnitude":
            salience = layer.weight.detach().flatten(1).abs().mean(dim=1)
        else:
            salience = torch.rand(layer.out_channels, generator=generator)
        return salience, salience


# bits -> (scale [C_out], zero point [C_out]) of each input part
Grids = dict[int, list[tuple[Tensor, Tensor]]]


@torch.no_grad()
def channel_errors(
    layer: QuantLayer, x: Tensor, widths: Sequence[int], find: GridSearch
) -> tuple[Tensor, Grids]:
    """Squared error of each out-channel at each width, and the grids of each width.

    The error is against the float layer, with quantized activations, relative to the power of the
    whole output. Leaves `layer` at the last width.

    Args:
        layer: A simulated layer with initialised ranges.
        x: Its input, `[B, ...]`, at the timesteps that the session's context has.
        widths: Weight bits to try.
        find: Search for the weight grids.

    Returns:
        `(errors [len(widths), C_out], grids)`.
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
    """Give each out-channel of `layer` its bits, and the grid that was fitted for them.

    `channel_bits [C_out]`; `grids` must hold every width in it.
    """
    layer.set_channel_bits(channel_bits)
    for index, (_, weights, _) in enumerate(layer.parts()):
        for bits, fitted in grids.items():
            members = channel_bits == bits
            weights.scale[members] = fitted[index][0][members]
            weights.zero_point[members] = fitted[index][1][members]


def sum_over_bits(errors: Tensor, channel_bits: Tensor, bits: int) -> Tensor:
    """Error of a whole layer: the sum over out-channels of their errors at the chosen bits.

    `errors [3, C_out]` are those at `bits - 1`, `bits` and `bits + 1`; `channel_bits [C_out]`.
    """
    rows = channel_bits.long() - (bits - 1)
    return errors.gather(0, rows[None]).sum()


def _record(name: str, layer: QuantLayer, errors: Tensor) -> dict[str, Any]:
    """Summary record of one layer whose bits were mixed."""
    levels, channels = layer.channel_bits.unique(return_counts=True)
    return {
        "layer": name,
        "channels": {str(b): n for b, n in zip(levels.tolist(), channels.tolist(), strict=True)},
        "mean_bits": float(layer.channel_bits.float().mean()),
        "errors": errors.tolist(),
    }
