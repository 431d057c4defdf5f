"""What the inputs of quantized layers look like, step by step, in the float model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.models.hooks import hooked
from stepquant.quantizers import QuantAttention, QuantLayer
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

VALUES_PER_STEP = 2048  # drawn at random
TAIL_PER_STEP = 64  # kept exactly at each end: a random draw has too few of them to weigh clipping
ROW = 64  # of the values that `outermost` compares by their extreme first


@dataclass
class Observation:
    """The input of one activation quantizer, row by row of the step grid.

    `low`, `high` `[T, C]`: exact extremes of each in-channel; `values [T, n]`: the outermost values
    and a random draw of the others; `weights [T, n]`: how many values each stands for.
    """

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    _room: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def add(self, steps: int, **rows: Tensor) -> None:
        """Append the next of `steps` rows to each list.

        All rows of a list lie in one tensor: many small ones between the forwards' large ones
        would keep the heap from shrinking, to several times the memory.
        """
        for name, row in rows.items():
            room = self._room.setdefault(name, row.new_empty(steps, *row.shape))
            kept = getattr(self, name)
            room[len(kept)] = row
            kept.append(room[len(kept)])


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The simulated layers of `model`, which may be one itself, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)
    }


def quant_attention(model: nn.Module) -> dict[str, QuantAttention]:
    """The simulated products of attention in `model` by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantAttention)
    }


def outermost(flat: Tensor, count: int, largest: bool) -> Tensor:
    """The `count` largest (or smallest) of `flat`, outermost first.

    They all lie in the `count` rows with the outermost extremes: finding these rows first is many
    times faster than `topk` over everything.
    """
    whole = flat.numel() // ROW * ROW
    if whole // ROW > 2 * count:
        rows = flat[:whole].view(-1, ROW)
        extremes = rows.amax(dim=1) if largest else rows.amin(dim=1)
        chosen = rows[extremes.topk(count, largest=largest).indices]
        flat = torch.cat([chosen.flatten(), flat[whole:]])
    return flat.topk(count, largest=largest, sorted=True).values


def tails_and_draw(flat: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`(values, weights)`, `[n]`, that stand for all of `flat`: both tails exactly, a random rest.

    Weights add up to `flat.numel()`. Small inputs are all tail and draw the rest from everything.
    """
    tail = min(TAIL_PER_STEP, flat.numel() // 4)
    low, high = outermost(flat, tail, largest=False), outermost(flat, tail, largest=True)
    pick = torch.randint(flat.numel(), (VALUES_PER_STEP,), generator=generator)
    drawn = flat[pick]
    if tail:
        # What a draw has beyond the tails' inner edges is counted there already.
        drawn = drawn.clamp(low[-1], high[-1])
    values = torch.cat([low, drawn, high])
    weights = torch.ones_like(values)
    weights[tail : len(values) - tail] = (flat.numel() - 2 * tail) / VALUES_PER_STEP
    return values, weights


@torch.no_grad()
def observe_probabilities(
    model: nn.Module,
    attention: dict[str, QuantAttention],
    trajectories: Trajectories,
    per_step: int,
    seed: int,
    reporter: Reporter,
) -> dict[str, Observation]:
    """One `Observation` of the probabilities of each of `attention`, parts of `model`, by its name.

    As the model is: of quantized queries and keys where it quantizes.
    """
    seen = {name: Observation() for name in attention}
    generator = torch.Generator().manual_seed(seed)
    steps = len(trajectories.timesteps)

    def look(name: str, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        flat = attention[name].float_probabilities(args[0], args[1], args[3]).flatten()
        values, weights = tails_and_draw(flat, generator)
        low, high = flat.amin().view(1), flat.amax().view(1)
        seen[name].add(steps, low=low, high=high, values=values, weights=weights)

    with (
        hooked(attention, before=look),
        reporter.task("observing probabilities", total=steps) as task,
    ):
        for step in range(steps):
            predict(model, trajectories.step(step, per_step))
            task.advance()
    return seen


@torch.no_grad()
def observe(
    model: nn.Module,
    trajectories: Trajectories,
    per_step: int,
    seed: int,
    reporter: Reporter,
    description: str = "observing activations",
) -> dict[tuple[str, int], Observation]:
    """One `Observation` for each (layer, input part), from `per_step` images at every step.

    Layers are seen as they are: in float where they are not `quantizing`, after scaling. Of an
    attention with quantized products the parts are queries, keys, values and probabilities, with
    one extreme for the whole tensor (`C = 1`).
    """
    layers = quant_layers(model)
    seen = {(name, i): Observation() for name, q in layers.items() for i in range(len(q.splits))}
    attention = quant_attention(model)
    seen |= {(name, i): Observation() for name in attention for i in range(4)}
    generator = torch.Generator().manual_seed(seed)
    step = 0
    now: dict[tuple[str, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}

    def add(name: str, index: int, tensor: Tensor, channels: Tensor) -> None:
        """Note `tensor`, which is `channels [*, C]` in another shape, for this step."""
        low, high = channels.amin(dim=0), channels.amax(dim=0)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise StepQuantError(
                f"the input of layer '{name}' holds NaN or infinity at timestep "
                f"{trajectories.timesteps[step].item():g}: expected finite activations; check "
                "the float model and its dtype"
            )
        values, weights = tails_and_draw(tensor.reshape(-1), generator)
        now.setdefault((name, index), []).append((low, high, values, weights))

    def look(name: str, args: tuple[Tensor, ...], _: dict[str, Any]) -> None:
        layer = layers[name]
        for index, part in enumerate(layer.input_parts(args[0])):
            add(name, index, part, part.movedim(layer.channel_dim, -1).flatten(0, -2))

    def look_at_attention(name: str, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        query, key, value, mask = args
        probabilities = attention[name].float_probabilities(query, key, mask)
        for index, operand in enumerate((query, key, value, probabilities)):
            add(name, index, operand, operand.reshape(-1, 1))

    with (
        hooked(layers, before=look),
        hooked(attention, before=look_at_attention),
        reporter.task(description, total=len(trajectories.timesteps)) as task,
    ):
        for step in range(len(trajectories.timesteps)):
            predict(model, trajectories.step(step, per_step))
            for key, calls in now.items():  # of a layer that the model uses twice, both
                lows, highs, values, weights = zip(*calls, strict=True)
                seen[key].add(
                    len(trajectories.timesteps),
                    low=torch.stack(lows).amin(dim=0),
                    high=torch.stack(highs).amax(dim=0),
                    values=torch.cat(values),
                    weights=torch.cat(weights),
                )
            now.clear()
            task.advance()
    return seen
