"""What the input layer's grid loses of the sampler's sample, passed by the denoiser.

The step `input_error_bypass` says why, and where the slopes come from.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stepquant.models.calling import channel_dim, prediction_in, with_prediction
from stepquant.quantizers.activation import spread_rows
from stepquant.quantizers.step_grid import StepContext

SLOPES_NAME = "input_error_slope"  # the buffer of the denoiser, float32 [T]


class InputLayer(Protocol):
    """A simulated or packed layer, which gives its errors away where it is asked to."""

    context: StepContext
    bypass: InputBypass | None


class InputBypass:
    """Adds `slope * (x - quantized x)` to the prediction for the sample `x`.

    `layer`: name of the denoiser's layer that reads the sample. The layer leaves its error here
    while it runs (`take`), where accelerate has its tables in place; a forward hook of the denoiser
    adds it. Where sample and prediction differ in channels, the first ones that both have are meant
    (a variance beside the noise, a mask beside the sample). Computed in float32; the result has the
    dtype of the prediction. No gradient passes.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        # float32 [T], whatever the denoiser's buffer, which is saved, may be cast to
        self.slopes = torch.zeros(1)
        self._context: StepContext | None = None
        self._error: Tensor | None = None  # of the forward in flight

    def attach(self, denoiser: nn.Module, slopes: Tensor) -> None:
        """Add to every prediction of `denoiser` from now on; `slopes [T]`, one for each step."""
        detach_bypass(denoiser)
        layer = cast(InputLayer, denoiser.get_submodule(self.layer))
        layer.bypass, self._context = self, layer.context
        denoiser.register_buffer(SLOPES_NAME, slopes)
        if not slopes.is_meta:
            self.read_slopes(denoiser)
        # A bound method, so that a deep copy of the denoiser gets one of its own.
        denoiser.register_forward_pre_hook(self._begin)
        denoiser.register_forward_hook(self._add)

    def read_slopes(self, denoiser: nn.Module) -> None:
        """Use the slopes in the buffer of `denoiser`, which were loaded."""
        self.slopes = denoiser.get_buffer(SLOPES_NAME).detach().cpu().clone()

    def take(self, error: Tensor) -> None:
        """Keep `error [B, ...]`, what the layer loses of the sample, for the prediction."""
        self._error = error

    def _begin(self, denoiser: nn.Module, args: tuple[Any, ...]) -> None:
        self._error = None  # of the layer, run by itself or in a forward that failed

    def _add(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        error, self._error = self._error, None
        if error is None:  # the layer did not run, or does not quantize now
            return output
        assert self._context is not None
        prediction = prediction_in(output, denoiser)
        slopes = self.slopes.to(error.device)
        slope = slopes[spread_rows(self._context.rows.to(error.device), len(error))]
        passed = slope.view(-1, *(1,) * (error.dim() - 1)) * error
        return with_prediction(output, added(prediction, passed.to(prediction.device)))


def common_channels(sample: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Both with as many channels as the one that has fewer."""
    dim = channel_dim(sample)
    count = min(sample.shape[dim], prediction.shape[dim])
    return sample.narrow(dim, 0, count), prediction.narrow(dim, 0, count)


def added(prediction: Tensor, passed: Tensor) -> Tensor:
    """`prediction` with the float32 `passed` in the channels that both have, in its dtype."""
    passed, first = common_channels(passed, prediction)
    whole = (first.to(torch.float32) + passed).to(prediction.dtype)
    if first.shape == prediction.shape:
        return whole
    dim = channel_dim(prediction)
    count = first.shape[dim]
    rest = prediction.narrow(dim, count, prediction.shape[dim] - count)
    return torch.cat([whole, rest], dim=dim)


def bypass_of(denoiser: nn.Module) -> InputBypass | None:
    """The bypass that was attached to `denoiser`, if any."""
    for hook in denoiser._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, InputBypass):
            return owner
    return None


def detach_bypass(denoiser: nn.Module) -> None:
    """Take the bypass of `denoiser` away, if it has one."""
    for hooks in (denoiser._forward_pre_hooks, denoiser._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), InputBypass):
                del hooks[key]  # type: ignore[attr-defined]
    for module in denoiser.modules():
        if getattr(module, "bypass", None) is not None:
            module.bypass = None  # type: ignore[assignment]
    if hasattr(denoiser, SLOPES_NAME):
        delattr(denoiser, SLOPES_NAME)
