"""Equivalent scaling: move per-in-channel factors from activations into weights.

With factors `s [C_in]` a layer computes the same function:

    Y = X W = (X / s) (s W)

The weight is multiplied by `s` along its in-channels. The division of the input is folded into the
producer where that is exact:

- a norm that no non-linearity follows,
- a projection that is linear in each channel,
- the linear layer that modulates a norm.

Elsewhere the activation quantizer applies it: one multiplication per input element.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stepquant.calibration.observe import Observation, observe
from stepquant.methods.session import Session
from stepquant.methods.step import Step
from stepquant.models.modulation import fold_into_modulation
from stepquant.quantizers import QuantLayer

# (weights of all consumers of one input part, concatenated over out-channels [C_out, C_part, ...],
#  largest |input| of each step and in-channel [T, C_part]) -> factors [C_part]
Factors = Callable[[Tensor, Tensor], Tensor]


class ScalingStep(Step):
    """A step that applies an equivalent scaling, before ranges are initialised.

    Every subclass declares the setting `fold` as its last one. True folds the division into other
    layers where that is exact. False makes each layer divide its own input, at one multiplication
    per input element. All layers then read and return the values of the float model's layers, so a
    LoRA of the float model fits.
    """

    needs_ranges = False


def scale_weight(layer: QuantLayer, factors: Tensor) -> None:
    """Multiply the weight of `layer` by `factors [C_in]` along its in-channels, in place."""
    layer.weight.data.mul_(factors.view(1, -1, *(1,) * (layer.weight.dim() - 2)))


def fold_into_producer(producer: Any, factors: Tensor) -> None:
    """Divide the first `C` output channels of `producer` by `factors [C]`, in place.

    Changes the producer's weight and bias. A producer with more output channels keeps the others.
    """
    weight = producer.weight.data[: len(factors)]
    weight.div_(factors.view(-1, *(1,) * (weight.dim() - 1)))
    if producer.bias is not None:
        producer.bias.data[: len(factors)].div_(factors)


def input_range(observation: Observation, factors: Tensor | None = None) -> float:
    """Width of the per-tensor activation range over all steps; the range contains zero.

    `factors [C]` divide each in-channel first.
    """
    low = torch.stack(observation.low).amin(dim=0)  # [C]
    high = torch.stack(observation.high).amax(dim=0)
    if factors is not None:
        low, high = low / factors, high / factors
    return float(high.amax().clamp(min=0) - low.amin().clamp(max=0))


def foldable(session: Session) -> list[tuple[Callable[[Tensor], None], tuple[str, ...]]]:
    """Groups of layers whose common input can be divided exactly by changing its producer.

    Returns:
        `(divide, consumers)` pairs. `divide(factors)` divides, in place, the tensor that all layers
        in `consumers` (names) read.
    """
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
    """Scale every layer of one kind, and return a summary record for each input part.

    Args:
        session: Gives the model, the adapter and the calibration inputs.
        factors_of: Computes the factors of one input part.
        samples_per_step: Images whose inputs are observed at each step.
        kind: Class of the layers to scale; by default all quantized layers.
        fold: False makes every layer divide its own input, and touches no other layer.

    Returns:
        Records with the keys:

        - `layer`, `part`: names of the layers that share the factors, joined by "+", and the index
          of the input part,
        - `folded`: whether the producer applies the division,
        - `scaled_share`: share of in-channels with a factor other than 1,
        - `median_factor`,
        - `range_before`, `range_after`: width of the activation range over the observed samples of
          all steps.
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
