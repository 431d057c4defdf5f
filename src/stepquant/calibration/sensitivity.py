"""First-order effect of errors inside layers, from one backward pass for each sample.

An error `e` in the input (or the weight) of a layer changes the prediction by `J e`. It changes a
function whose gradient with respect to the prediction is `v` by `v · J e`. One backward pass from
`v` gives `Jᵀ v` for all layers at once. (For random `v`, this is Hutchinson's trick.) The joint
effect of all steps of a trajectory on its image is the sum `Σ_t v_t · J_t e_t`. The sum is squared
as a whole, because rounding errors of neighbouring steps are similar and add up.
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

AT_ONCE = 10  # samples of a trajectory in one backward pass

# (sample numbers [B], a layer's inputs [B, ...]) -> error of each candidate, each [B, ...]
InputErrors = Callable[[Tensor, Tensor], list[Tensor]]


@dataclass
class OutputErrors:
    """Mean of `(Σ v · J e)²` over the trajectories, by layer name.

    - `weights`: for each candidate and out-channel, `[candidates, C_out]`, float64.
    - `inputs`: for each candidate, `[candidates]`, float64.
    - `sizes`: number of values in the layer's input for one sample.
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
    """Return the first-order effect of candidate quantizations of `layers`.

    Effects of one trajectory add up before they are squared.

    Args:
        model: model that computes in float.
        layers: layers of `model` by name.
        data: inputs of the denoiser, `N` samples.
        gradients: `v` for each sample, `[N, C, H, W]`.
        weight_errors: by layer, the weight error of each candidate, `[C_out, C_in, ...]` each.
        input_errors: by layer, a function that returns the input error of each candidate.
        reporter: shows progress.

    Raises:
        StepQuantError: a prediction of the model is not finite.
    """
    seen: dict[str, Tensor] = {}

    def keep(
        name: str, args: tuple[Tensor, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        x = x.view_as(x)  # a view collects this layer's gradient only, even if others read `x`
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
    """Return `v · J e` summed over samples, by candidate and out-channel: `[candidates, C_out]`."""
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.flatten(1).double()
    return torch.stack([(gradient * error.flatten(1)).sum(dim=1) for error in errors])


def _moved_by_input(x: Tensor, errors: list[Tensor]) -> Tensor:
    """Return `v · J e` of each candidate, summed over the samples, `[candidates]`."""
    assert x.grad is not None
    return torch.stack([(x.grad * error).sum().double() for error in errors])
