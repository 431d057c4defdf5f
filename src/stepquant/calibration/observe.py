"""Statistics of the inputs of quantized layers, step by step."""

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

VALUES_PER_STEP = 2048  # values drawn at random
TAIL_PER_STEP = 64  # exact values at each end: a random draw has too few to judge clipping
ROW = 64  # values in each row that `outermost` compares by its extreme first

# Of each quantizer's calls at one step: low and high by channel, values and their weights.
_Calls = dict[tuple[str, int], list[tuple[Tensor, Tensor, Tensor, Tensor]]]


@dataclass
class Observation:
    """Statistics of one activation quantizer's input, with one entry for each step.

    - `low`, `high`: `T` tensors `[C]`, the exact extremes of each in-channel.
    - `values`: `T` tensors `[n]`, the outermost values and a random draw of the others.
    - `weights`: `T` tensors `[n]`, the number of values that each of `values` stands for.
    """

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    _room: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def add(self, steps: int, **rows: Tensor) -> None:
        """Append the next of `steps` rows to each list.

        Steps may differ in their number of values. The shorter rows then end with values of weight
        0, copies of their last value, so that rows stack.

        All rows of a list are views of one tensor. Many small tensors between the large ones of the
        forward passes would keep the heap from shrinking, at several times the memory.
        """
        for name, row in rows.items():
            room = self._room.setdefault(name, row.new_empty(steps, *row.shape))
            kept = getattr(self, name)
            if len(row) > room.shape[1]:
                room = self._room[name] = _longer(room, len(row), name)
                kept[:] = room[: len(kept)]
            room[len(kept)] = _longer(row[None], room.shape[1], name)[0]
            kept.append(room[len(kept)])

    def repeat_last(self, steps: int) -> None:
        """Append a copy of the last row, for a step without a call."""
        lists = {name: getattr(self, name) for name in ("low", "high", "values", "weights")}
        self.add(steps, **{name: kept[-1].clone() for name, kept in lists.items()})


def _longer(rows: Tensor, length: int, name: str) -> Tensor:
    """`rows [n, m]` as `[n, length]`: repeats each row's last value, or 0 for `weights`."""
    if rows.shape[1] == length:
        return rows
    last = torch.zeros_like(rows[:, -1:]) if name == "weights" else rows[:, -1:]
    return torch.cat([rows, last.expand(-1, length - rows.shape[1])], dim=1)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the simulated layers of `model` by name; `model` itself may be one."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)
    }


def quant_attention(model: nn.Module) -> dict[str, QuantAttention]:
    """Return the modules of `model` that simulate quantized attention products, by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantAttention)
    }


def outermost(flat: Tensor, count: int, largest: bool) -> Tensor:
    """Return the `count` largest (or smallest) values of `flat [n]`, outermost first.

    All of them lie in the `count` rows with the outermost extremes. Finding these rows first is
    many times faster than `topk` over all values.
    """
    whole = flat.numel() // ROW * ROW
    if whole // ROW > 2 * count:
        rows = flat[:whole].view(-1, ROW)
        extremes = rows.amax(dim=1) if largest else rows.amin(dim=1)
        chosen = rows[extremes.topk(count, largest=largest).indices]
        flat = torch.cat([chosen.flatten(), flat[whole:]])
    return flat.topk(count, largest=largest, sorted=True).values


def tails_and_draw(flat: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return weighted `values` and their `weights`, each `[n]`, that stand for all of `flat`.

    The values are both tails of `flat`, exactly, and a random draw. Each tail has `TAIL_PER_STEP`
    values, and at most a quarter of `flat`. A drawn value beyond the inner edge of a tail is
    clamped to that edge. The weights add up to `flat.numel()`.
    """
    tail = min(TAIL_PER_STEP, flat.numel() // 4)
    low, high = outermost(flat, tail, largest=False), outermost(flat, tail, largest=True)
    pick = torch.randint(flat.numel(), (VALUES_PER_STEP,), generator=generator)
    drawn = flat[pick]
    if tail:
        # The tails already count the values beyond their inner edges.
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
    """Observe the attention probabilities of each of `attention`, modules of `model`, by name.

    The extremes are those of the whole tensor (`C = 1`). The probabilities are those of the model
    in its current state: if the model quantizes, they follow from quantized queries and keys. Each
    step runs `per_step` images of `trajectories`.
    """
    seen = {(name, 0): Observation() for name in attention}
    generator = torch.Generator().manual_seed(seed)
    steps = len(trajectories.timesteps)
    now: _Calls = {}

    def look(name: str, args: tuple[Any, ...], _: dict[str, Any]) -> None:
        flat = attention[name].float_probabilities(args[0], args[1], args[3]).flatten()
        values, weights = tails_and_draw(flat, generator)
        now.setdefault((name, 0), []).append(
            (flat.amin().view(1), flat.amax().view(1), values, weights)
        )

    with (
        hooked(attention, before=look),
        reporter.task("observing probabilities", total=steps) as task,
    ):
        for step in range(steps):
            predict(model, trajectories.step(step, per_step))
            _end_step(seen, now, step, steps)
            task.advance()
    return {name: seen[name, 0] for name in attention}


@torch.no_grad()
def observe(
    model: nn.Module,
    trajectories: Trajectories,
    per_step: int,
    seed: int,
    reporter: Reporter,
    description: str = "observing activations",
) -> dict[tuple[str, int], Observation]:
    """Observe the inputs of all simulated layers, with `per_step` images at every step.

    Returns one `Observation` for each (layer name, input part). The inputs are those of the model
    in its current state, after scaling; a layer that is not `quantizing` computes in float. The
    parts of an attention with quantized products are queries, keys, values and probabilities, in
    this order. Their extremes are those of the whole tensor (`C = 1`). A step at which the model
    does not call a layer has the statistics of the nearest step before it that does, or else of the
    first one. A layer that is never called has no entries.

    Raises:
        StepQuantError: an input holds NaN or infinity.
    """
    layers = quant_layers(model)
    seen = {(name, i): Observation() for name, q in layers.items() for i in range(len(q.splits))}
    attention = quant_attention(model)
    seen |= {(name, i): Observation() for name in attention for i in range(4)}
    generator = torch.Generator().manual_seed(seed)
    step = 0
    now: _Calls = {}

    def add(name: str, index: int, tensor: Tensor, channels: Tensor) -> None:
        """Record `tensor` for this step; `channels [*, C]` holds the same values."""
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
        steps = len(trajectories.timesteps)
        for step in range(steps):
            predict(model, trajectories.step(step, per_step))
            _end_step(seen, now, step, steps)
            task.advance()
    return seen


def _end_step(seen: dict[tuple[str, int], Observation], now: _Calls, step: int, steps: int) -> None:
    """Move the calls of one step from `now` to `seen`, which then has rows up to this step."""
    for key, calls in now.items():  # several calls if the model uses a layer twice
        lows, highs, values, weights = zip(*calls, strict=True)
        row = {
            "low": torch.stack(lows).amin(dim=0),
            "high": torch.stack(highs).amax(dim=0),
            "values": torch.cat(values),
            "weights": torch.cat(weights),
        }
        for _ in range(step + 1 - len(seen[key].low)):  # also for the steps before the first call
            seen[key].add(steps, **row)
    for observation in seen.values():
        if observation.low and len(observation.low) <= step:
            observation.repeat_last(steps)
    now.clear()
