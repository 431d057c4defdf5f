"""What an error inside a layer changes, to the first order, from one backward pass for each sample.

An error `e` in the input (or the weight) of a layer changes the prediction by `J e`, and something
that has the gradient `v` by the prediction by `v · J e`. One backward pass from `v` gives `Jᵀ v`
for all layers at once (where `v` is random, this is Hutchinson's trick). What the steps of a
trajectory do together to its image is their sum, `Σ_t v_t · J_t e_t`: rounding errors of
neighbouring steps are alike, and add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.models.hooks import hooked
from stepquant.quantizers import QuantLayer
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

AT_ONCE = 10  # samples of a trajectory

# Numbers of samples [B], a layer's inputs [B, ...] -> what each candidate adds, each `[B, ...]`
InputErrors = Callable[[Tensor, Tensor], list[Tensor]]


@dataclass
class OutputErrors:
    """Mean of `(Σ v · J e)²` over the trajectories, layer by layer.

    `weights`: of each candidate and out-channel, `[candidates, C_out]`; `inputs`: of each
    candidate, `[candidates]`; both float64. `sizes`: how many values the input of a sample has.
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

    `gradients [N, C, H, W]`: `v` for each sample of `data`; those of one trajectory add up before
    they are squared. `weight_errors`: by layer, what each candidate adds to the weight, each
    `[C_out, C_in, ...]`; `input_errors`: by layer, what gives the same for its input. Raises
    StepQuantError where the model predicts no finite numbers.
    """
    seen: dict[str, Tensor] = {}

    def keep(
        name: str, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        x = x.view_as(x)  # this layer's own share of the gradient, where others read `x` too
        x.retain_grad()
        seen[name] = x
        return (x, *args[1:]), kwargs

    weights: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    sizes: dict[str, int] = {}
    trajectories = data.trajectory.unique()
    try:
        with (
            hooked(layers, before=keep),
            reporter.task("measuring what errors do", total=len(data)) as task,
        ):
            for trajectory in trajectories:
                model.zero_grad(set_to_none=True)
                moved: dict[str, Tensor] = {}
                for part in (data.trajectory == trajectory).nonzero().flatten().split(AT_ONCE):
                    y = _prediction(model, data, part)
                    y.backward(gradients[part])
                    for name, errors_of in input_errors.items():
                        x = seen[name]
                        found = _moved_by_input(x, errors_of(part, x.detach()))
                        moved[name] = found + moved.get(name, 0)
                        sizes[name] = x.numel() // len(part)
                    task.advance(len(part))
                for name, change in moved.items():
                    inputs[name] = change.square() + inputs.get(name, 0)
                for name, errors in weight_errors.items():
                    change = _moved_by_weight(layers[name], errors)
                    weights[name] = change.square() + weights.get(name, 0)
    finally:
        model.zero_grad(set_to_none=True)
    return OutputErrors(
        {name: total / len(trajectories) for name, total in weights.items()},
        {name: total / len(trajectories) for name, total in inputs.items()},
        sizes,
    )


def _prediction(model: nn.Module, data: Trajectories, part: Tensor) -> Tensor:
    y = predict(model, data.take(part))
    if not torch.isfinite(y).all():
        bad = data.timestep[part][~torch.isfinite(y).flatten(1).all(dim=1)]
        raise StepQuantError(
            f"the prediction at timestep {bad[0].item():g} holds NaN or infinity: expected "
            "finite numbers; check the float model"
        )
    return y


def _moved_by_weight(layer: QuantLayer, errors: list[Tensor]) -> Tensor:
    """`v . J e` of each candidate and out-channel, summed over samples, `[candidates, C_out]`."""
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.flatten(1).double()
    return torch.stack([(gradient * error.flatten(1)).sum(dim=1) for error in errors])


def _moved_by_input(x: Tensor, errors: list[Tensor]) -> Tensor:
    """`v . J e` of each candidate, summed over the samples, `[candidates]`."""
    assert x.grad is not None
    return torch.stack([(x.grad * error).sum().double() for error in errors])
