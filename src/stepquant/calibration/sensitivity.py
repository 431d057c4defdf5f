"""What an error inside a layer changes, to the first order, from one backward pass for each sample.

An error `e` in the input (or the weight) of a layer changes the prediction by `J e`, and something
that has the gradient `v` by the prediction by `v · J e`. One backward pass from `v` gives `Jᵀ v`
for all layers at once (where `v` is random, this is Hutchinson's trick).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories
from stepquant.errors import StepQuantError
from stepquant.progress import Reporter
from stepquant.quantizers import QuantLayer

# Number of the sample, a layer's input [1, ...] -> what each candidate adds to it, each `[1, ...]`
InputErrors = Callable[[int, Tensor], list[Tensor]]


@dataclass
class OutputErrors:
    """Mean of `(v · J e)²` over the samples, layer by layer.

    `weights`: of each candidate and out-channel, `[candidates, C_out]`; `inputs`: of each
    candidate, `[candidates]`; both float64. `sizes`: how many values these inputs have.
    """

    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    sizes: dict[str, int]


def output_errors(
    model: nn.Module,
    layers: dict[str, QuantLayer],
    data: Trajectories,
    gradients: Tensor,
    weight_errors: dict[str, list[Tensor]],
    input_errors: dict[str, InputErrors],
    reporter: Reporter,
) -> OutputErrors:
    """What candidates for `layers` of `model`, which computes in float, would change.

    `gradients [N, C, H, W]`: `v` for each sample of `data`. `weight_errors`: by layer, what each
    candidate adds to the weight, each `[C_out, C_in, ...]`; `input_errors`: by layer, what gives
    the same for its input. Raises StepQuantError where the model predicts no finite numbers.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        x = x.view_as(x)  # this layer's own share of the gradient, where others read `x` too
        x.retain_grad()
        seen[name] = x
        return (x, *args[1:])

    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
        for name, layer in layers.items()
    ]
    try:
        with reporter.task("measuring what errors do", total=len(data)) as task:
            for index in range(len(data)):
                y = _prediction(model, data, index)
                model.zero_grad(set_to_none=True)
                y.backward(gradients[index : index + 1])
                for name, errors in weight_errors.items():
                    moved = _moved_by_weight(layers[name], errors)
                    weights[name] = moved + weights.get(name, 0)
                for name, errors_of in input_errors.items():
                    moved = _moved_by_input(seen[name], errors_of(index, seen[name].detach()))
                    inputs[name] = moved + inputs.get(name, 0)
                    sizes[name] = seen[name].numel()
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return OutputErrors(
        {name: total / len(data) for name, total in weights.items()},
        {name: total / len(data) for name, total in inputs.items()},
        sizes,
    )


def _prediction(model: nn.Module, data: Trajectories, index: int) -> Tensor:
    sample, timestep = data.sample[index : index + 1], data.timestep[index : index + 1]
    y: Tensor = model(sample, timestep, return_dict=False)[0]
    if not torch.isfinite(y).all():
        raise StepQuantError(
            f"the prediction at timestep {timestep.item():g} holds NaN or infinity: expected "
            "finite numbers; check the float model"
        )
    return y


def _moved_by_weight(layer: QuantLayer, errors: list[Tensor]) -> Tensor:
    """`(v . J e)^2` of each candidate and out-channel, `[candidates, C_out]`."""
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.flatten(1).double()
    return torch.stack([(gradient * error.flatten(1)).sum(dim=1).square() for error in errors])


def _moved_by_input(x: Tensor, errors: list[Tensor]) -> Tensor:
    """`(v . J e)^2` of each candidate, `[candidates]`."""
    assert x.grad is not None
    return torch.stack([(x.grad * error).sum().double().square() for error in errors])
