"""How far an error inside a layer moves what the model predicts, estimated with random projections.

To the first order, an error `e` in the input (or the weight) of a layer changes the prediction by
`J e`. Where `v` has independent entries of mean 0 and variance 1, `(v . J e)^2` is `|J e|^2` in the
mean, and one backward pass from `v . y` gives `J^T v` for all layers at once (Hutchinson's trick).
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
    """Power of the error in the prediction, over the power of the prediction, layer by layer.

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
    weight_errors: dict[str, list[Tensor]],
    input_errors: dict[str, InputErrors],
    sample_weights: Tensor,
    seed: int,
    reporter: Reporter,
) -> OutputErrors:
    """What candidates for `layers` of `model`, which computes in float, would do to its output.

    `weight_errors`: by layer, what each candidate adds to the weight, each `[C_out, C_in, ...]`;
    `input_errors`: by layer, what gives the same for its input. `sample_weights [N]`: how much each
    sample of `data` counts. One projection for each, of independent signs. Raises StepQuantError
    where the model predicts no finite numbers.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        x = x.view_as(x)  # this layer's own share of the gradient, where others read `x` too
        x.retain_grad()
        seen[name] = x
        return (x, *args[1:])

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    power = 0.0
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: keep(name, args))
        for name, layer in layers.items()
    ]
    try:
        with reporter.task("measuring what errors do", total=len(data)) as task:
            for index in range(len(data)):
                y = _prediction(model, data, index)
                weight = float(sample_weights[index])
                power += weight * float(y.detach().double().square().sum())
                v = torch.randint(0, 2, y.shape, generator=generator) * 2.0 - 1.0
                model.zero_grad(set_to_none=True)
                (v * y).sum().backward()
                for name, errors in weight_errors.items():
                    moved = _moved_by_weight(layers[name], errors)
                    weights[name] = weight * moved + weights.get(name, 0)
                for name, errors_of in input_errors.items():
                    moved = _moved_by_input(seen[name], errors_of(index, seen[name].detach()))
                    inputs[name] = weight * moved + inputs.get(name, 0)
                    sizes[name] = seen[name].numel()
                task.advance()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return OutputErrors(
        {name: total / power for name, total in weights.items()},
        {name: total / power for name, total in inputs.items()},
        sizes,
    )


def _prediction(model: nn.Module, data: Trajectories, index: int) -> Tensor:
    sample, timestep = data.sample[index : index + 1], data.timestep[index : index + 1]
    y: Tensor = model(sample, timestep, return_dict=False)[0]
    if not torch.isfinite(y).all() or not y.any():
        raise StepQuantError(
            f"the prediction at timestep {timestep.item():g} is zero, NaN or infinity: expected "
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
