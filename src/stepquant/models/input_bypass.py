"""What the input layer's grid loses of the sampler's sample, passed by the denoiser.

The step `input_error_bypass` says why, and where the slopes come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stepquant.models.calling import argument_names, prediction_in, with_prediction
from stepquant.quantizers.activation import spread_rows
from stepquant.quantizers.step_grid import StepContext

SLOPES_NAME = "input_error_slope"  # the buffer of the denoiser, float32 [T]


class InputLayer(Protocol):
    """A simulated or packed layer, which knows what its grid loses."""

    context: StepContext

    def input_error(self, x: Tensor) -> Tensor:
        """The input `x` less what its grid holds of it, float32, in the shape of `x`."""
        ...


class InputBypass:
    """A forward hook that adds `slope * (x - quantized x)` to the prediction for the sample `x`.

    `layer`: name of the denoiser's layer that reads the sample. Where a prediction has more
    channels than the sample (a variance beside the noise) or fewer (a mask beside the sample), the
    first ones are meant. Float32, in the dtype of the prediction in the end.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer

    def attach(self, denoiser: nn.Module, slopes: Tensor) -> None:
        """Add to every prediction of `denoiser` from now on; `slopes [T]`, one for each step."""
        denoiser.register_buffer(SLOPES_NAME, slopes)
        # A bound method, so that a deep copy of the denoiser gets a hook of its own.
        denoiser.register_forward_hook(self._add, with_kwargs=True)

    def _add(
        self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        slopes = getattr(denoiser, SLOPES_NAME, None)
        if slopes is None:  # taken away with the grids, when the model was dequantized
            return output
        sample = args[0] if args else kwargs[argument_names(denoiser)[0]]
        layer = cast(InputLayer, denoiser.get_submodule(self.layer))
        prediction = prediction_in(output, denoiser)
        with torch.no_grad():
            rows = layer.context.rows.to(slopes.device)
            slope = slopes[spread_rows(rows, len(sample))].to(sample.device)
            passed = slope.view(-1, *(1,) * (sample.dim() - 1)) * layer.input_error(sample)
        return with_prediction(output, _added(prediction, passed))


def common_channels(sample: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many channels (dimension 1) as the one that has fewer."""
    if sample.shape == prediction.shape:
        return sample, prediction
    count = min(sample.shape[1], prediction.shape[1])
    return sample[:, :count], prediction[:, :count]


def _added(prediction: Tensor, passed: Tensor) -> Tensor:
    """`prediction` with `passed` in the channels that both have."""
    passed, first = common_channels(passed, prediction)
    whole = first + passed.to(prediction.dtype)
    if first.shape == prediction.shape:
        return whole
    return torch.cat([whole, prediction[:, whole.shape[1] :]], dim=1)


def bypass_of(denoiser: nn.Module) -> InputBypass | None:
    """The bypass that was attached to `denoiser`, if any."""
    for hook in denoiser._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, InputBypass) and hasattr(denoiser, SLOPES_NAME):
            return owner
    return None
