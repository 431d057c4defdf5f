"""Moving per-in-channel factors from activations into weights, without changing the function.

For factors `s [C_in]`: the weight is multiplied by `s` along its in-channels and the layer's input
divided by it. The division is folded into the producer where that is exact (a norm without a
non-linearity behind it, a projection that is linear in the channel, the layer that modulates a
norm), else it becomes a divisor of the activation quantizer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from stepquant.calibration.observe import Observation, observe
from stepquant.methods.session import Session
from stepquant.methods.step import Step
from stepquant.models.modulation import fold_into_modulation
from stepquant.quantizers import QuantLayer

# (weights of all consumers of one input part, concatenated over out-channels: [C_out, C_part, ...],
#  largest |input| per step and in-channel [T, C_part]) -> factors [C_part]
Factors = Callable[[Tensor, Tensor], Tensor]


class ScalingStep(Step):
    """A step that scales before ranges are taken. Each has a last setting `fold`.

    `fold`: whether the division goes into other layers where that is exact. Without, each layer
    divides its own input, at the price of one multiplication, and all layers see and give what
    those of the float model do: a LoRA of the float model then fits.
    """

    needs_ranges = False


def scale_weight(layer: QuantLayer, factors: Tensor) -> None:
    """Multiply the weight of `layer` by `factors [C_in]` along its in-channels."""
    layer.weight.data.mul_(factors.view(1, -1, *(1,) * (layer.weight.dim() - 2)))


def fold_into_producer(producer: torch.nn.Module, factors: Tensor) -> None:
    """Divide the producer's (first) output channels by `factors`, through its weight and bias."""
    weight = producer.weight.data[: len(factors)]
    weight.div_(factors.view(-1, *(1,) * (weight.dim() - 1)))
    if producer.bias is not None:
        producer.bias.data[: len(factors)].div_(factors)


def input_range(observation: Observation, factors: Tensor | None = None) -> float:
    """Width of the per-tensor range over all steps, each in-channel divided by `factors`."""
    low = torch.stack(observation.low).amin(dim=0)  # [C]
    high = torch.stack(observation.high).amax(dim=0)
    if factors is not None:
        low, high = low / factors, high / factors
    return float(high.amax().clamp(min=0) - low.amin().clamp(max=0))


def foldable(session: Session) -> list[tuple[Callable[[Tensor], None], tuple[str, ...]]]:
    """For each group of layers that read the same thing, what divides that thing by factors."""
    model, adapter = session.model, session.adapter
    found: list[tuple[Callable[[Tensor], None], tuple[str, ...]]] = [
        (partial(fold_into_producer, model.get_submodule(producer)), consumers)
        for producer, consumers in adapter.folds(model)
    ]
    for entry in adapter.modulations(model):
        linear = model.get_submodule(entry.linear)
        fold = partial(fold_into_modulation, linear, entry.shift, entry.scale)
        found.append((fold, entry.consumers))
    return found


@torch.no_grad()
def apply_scaling(
    session: Session,
    factors_of: Factors,
    samples_per_step: int = 8,
    kind: type[QuantLayer] = QuantLayer,
    fold: bool = True,
) -> list[dict[str, object]]:
    """Scale every layer of one kind (by default: all); a summary record for each input part.

    A record holds the layer, part, whether the scaling was folded, the share of in-channels with a
    factor other than 1, the median factor, and the activation range before and after (over the
    calibration samples, all steps together). Without `fold` every layer divides its own input, and
    no other layer is touched.
    """
    layers = {name: layer for name, layer in session.layers().items() if isinstance(layer, kind)}
    seen = observe(
        session.model, session.trajectories, samples_per_step, session.seed, session.reporter
    )
    folds = {
        consumer: (divide, consumers)
        for divide, consumers in (foldable(session) if fold else ())
        if all(name in layers for name in consumers)
        for consumer in consumers
    }
    records: list[dict[str, object]] = []
    done: set[str] = set()
    for name, layer in layers.items():
        if name in done:
            continue
        divide, group = folds.get(name, (None, (name,)))
        done.update(group)
        parts = []
        for index, part_weight in enumerate(layer.weight_parts()):
            others = [layers[other].weight_parts()[index] for other in group if other != name]
            weight = torch.cat([part_weight, *others])
            seen_part = seen[name, index]
            largest = torch.maximum(torch.stack(seen_part.high), -torch.stack(seen_part.low))
            factors = factors_of(weight, largest)
            parts.append(factors)
            records.append(
                {
                    "layer": name if len(group) == 1 else "+".join(group),
                    "part": index,
                    "folded": divide is not None,
                    "scaled_share": float((factors != 1).float().mean()),
                    "median_factor": float(factors.median()),
                    "range_before": input_range(seen_part),
                    "range_after": input_range(seen_part, factors),
                }
            )
        all_factors = torch.cat(parts)
        for member in group:
            scale_weight(layers[member], all_factors)
        if divide is not None:
            divide(all_factors)
        else:
            layer.multiply_channel_scale(all_factors)
    return records
