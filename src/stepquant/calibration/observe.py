"""What the inputs of quantized layers look like, step by step, in the float model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories
from stepquant.errors import StepQuantError
from stepquant.progress import Reporter
from stepquant.quantizers import QuantLayer

VALUES_PER_STEP = 2048


@dataclass
class Observation:
    """The input of one activation quantizer, row by row of the step grid.

    `low`, `high` `[T, C]`: exact extremes of each in-channel; `values [T, n]`: a random sample.
    """

    low: list[Tensor] = field(default_factory=list)
    high: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The simulated layers of `model` by name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)
    }


@torch.no_grad()
def observe(
    model: nn.Module,
    trajectories: Trajectories,
    per_step: int,
    seed: int,
    reporter: Reporter,
    description: str = "observing activations",
) -> dict[tuple[str, int], Observation]:
    """One `Observation` for each (layer, input part), from `per_step` samples at every step.

    Layers are seen as they are: in float where they are not `quantizing`, after scaling.
    """
    layers = quant_layers(model)
    seen = {(name, i): Observation() for name, q in layers.items() for i in range(len(q.splits))}
    generator = torch.Generator().manual_seed(seed)
    step = 0

    def look(name: str, layer: QuantLayer, args: tuple[Tensor, ...]) -> None:
        for index, part in enumerate(layer.input_parts(args[0])):
            channels = part.movedim(layer.channel_dim, -1).flatten(0, -2)  # [*, C]
            low, high = channels.amin(dim=0), channels.amax(dim=0)
            if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
                raise StepQuantError(
                    f"the input of layer '{name}' holds NaN or infinity at timestep "
                    f"{trajectories.timesteps[step].item():g}: expected finite activations; check "
                    "the float model and its dtype"
                )
            flat = part.reshape(-1)
            pick = torch.randint(flat.numel(), (VALUES_PER_STEP,), generator=generator)
            record = seen[name, index]
            record.low.append(low)
            record.high.append(high)
            record.values.append(flat[pick])

    handles = [
        layer.register_forward_pre_hook(lambda q, args, name=name: look(name, q, args))
        for name, layer in layers.items()
    ]
    try:
        with reporter.task(description, total=len(trajectories.timesteps)) as task:
            for step in range(len(trajectories.timesteps)):
                model(trajectories.at_step(step, per_step), trajectories.timesteps[step])
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
    return seen
