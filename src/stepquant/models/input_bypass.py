"""Bypass that adds the input layer's quantization error back to the prediction.

The step `input_error_bypass` explains why, and where the slopes come from.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from stepquant.models.calling import channel_dim, prediction_in, with_prediction
from stepquant.quantizers.activation import spread_rows
from stepquant.quantizers.call_state import PerThread
from stepquant.quantizers.step_grid import StepContext

SLOPES_NAME = "input_error_slope"  # buffer of the denoiser, float32 [T]


class InputLayer(Protocol):
    """A simulated or packed layer that hands its input error to an attached bypass."""

    context: StepContext
    bypass: InputBypass | None


class InputBypass:
    """Adds `slope * (x - quantized x)` to the prediction for the sample `x`.

    `layer` names the denoiser's layer that reads the sample. That layer hands over its error while
    it runs (`take`), because accelerate has its tables in place only then. A forward hook of the
    denoiser adds the error to the prediction.

    If sample and prediction differ in channels, the bypass acts on the first channels, which both
    have. The others are a variance beside the noise, or a mask beside the sample. The sum is
    computed in float32 and returned in the dtype of the prediction. No gradient flows through the
    error.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        # float32 [T], a copy: the denoiser's saved buffer may be cast to another dtype
        self.slopes = torch.zeros(1)
        self._context: StepContext | None = None
        # Of the calls in each thread: the error, float32 [B, ...], with the rows of its samples
        self._here = PerThread()

    def attach(self, denoiser: nn.Module, slopes: Tensor) -> None:
        """Add the input error to every prediction of `denoiser` from now on.

        `slopes [T]`, float32, has one value for each step. An earlier bypass is removed. Slopes on
        the meta device are read later, by `read_slopes`.
        """
        detach_bypass(denoiser)
        layer = cast(InputLayer, denoiser.get_submodule(self.layer))
        layer.bypass, self._context = self, layer.context
        denoiser.register_buffer(SLOPES_NAME, slopes)
        if not slopes.is_meta:
            self.read_slopes(denoiser)
        # Bound methods: a deep copy of the denoiser then gets a bypass of its own.
        denoiser.register_forward_pre_hook(self._begin)
        denoiser.register_forward_hook(self._add, always_call=True)

    def read_slopes(self, denoiser: nn.Module) -> None:
        """Copy the slopes from the buffer of `denoiser`, after a checkpoint is loaded."""
        self.slopes = denoiser.get_buffer(SLOPES_NAME).detach().cpu().clone()

    def take(self, error: Tensor) -> None:
        """Keep the layer's input error `[B, ...]`, float32, until the denoiser has predicted."""
        assert self._context is not None
        self._here.state.value = error, self._context.rows

    def _begin(self, denoiser: nn.Module, args: tuple[Any, ...]) -> None:
        state = self._here.state
        state.begin()
        state.value = None  # left over from a call of the layer alone

    def _add(self, denoiser: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state = self._here.state
        taken = state.end()
        if taken is None:  # the layer did not run, or is not quantizing
            return output
        if state.value is taken:  # the outermost call has ended
            state.value = None
        if output is None:  # the denoiser failed
            return None
        error, rows = taken
        prediction = prediction_in(output, denoiser)
        slopes = self.slopes.to(error.device)
        slope = slopes[spread_rows(rows.to(error.device), len(error))]
        passed = slope.view(-1, *(1,) * (error.dim() - 1)) * error
        return with_prediction(output, added(prediction, passed.to(prediction.device)))


def common_channels(sample: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors, cut to the first channels that both have."""
    dim = channel_dim(sample)
    count = min(sample.shape[dim], prediction.shape[dim])
    return sample.narrow(dim, 0, count), prediction.narrow(dim, 0, count)


def added(prediction: Tensor, passed: Tensor) -> Tensor:
    """Return `prediction` plus `passed`, in the channels that both have.

    `passed` is float32, and so is the sum. The result has the shape and dtype of `prediction`.
    """
    passed, first = common_channels(passed, prediction)
    whole = (first.to(torch.float32) + passed).to(prediction.dtype)
    if first.shape == prediction.shape:
        return whole
    dim = channel_dim(prediction)
    count = first.shape[dim]
    rest = prediction.narrow(dim, count, prediction.shape[dim] - count)
    return torch.cat([whole, rest], dim=dim)


def bypass_of(denoiser: nn.Module) -> InputBypass | None:
    """Return the bypass attached to `denoiser`, or None."""
    for hook in denoiser._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, InputBypass):
            return owner
    return None


def detach_bypass(denoiser: nn.Module) -> None:
    """Remove the bypass and its slopes from `denoiser`, if it has one."""
    for hooks in (denoiser._forward_pre_hooks, denoiser._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), InputBypass):
                del hooks[key]  # type: ignore[attr-defined]
    for module in denoiser.modules():
        if getattr(module, "bypass", None) is not None:
            module.bypass = None  # type: ignore[assignment]
    if hasattr(denoiser, SLOPES_NAME):
        delattr(denoiser, SLOPES_NAME)
