"""Bias correction of the prediction: PTQD (He et al., NeurIPS 2023, arXiv 2305.10657), section 4.

Rounding and clipping shift the mean of the prediction. The sampler adds up shifts of the same
direction, until the images are too dark or too bright. With `ε̂` the quantized and `ε` the float
prediction, channel `c` at step `t` is corrected by its mean error:

    ε̂_t[c] - mean(ε̂_t[c] - ε_t[c])

Deviations:

- PTQD also scales the prediction, for the part of the error that is proportional to it, and lowers
  the variance of a stochastic sampler by that of the rest. Neither is done here.
- PTQD corrects in the sampler. Here the correction is part of the model, for any sampler.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from stepquant.calibration.block_inputs import execution_order
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.methods.session import Session
from stepquant.methods.step import Step, register_step
from stepquant.models.calling import channel_dim
from stepquant.models.hooks import hooked
from stepquant.quantizers import QuantLayer
from stepquant.support.errors import StepQuantError


@register_step
class BiasCorrection(Step):
    """Subtract, at each step, the mean error of each channel of the prediction.

    The mean is over all positions. It becomes part of the output layer's bias, with a row for each
    step, so it costs no further computation. Steps that train or change grids are refused after
    this one: the correction would be of errors that the model no longer has.

    Attributes:
        samples_per_step: Images whose inputs the mean is measured on, at each step.
    """

    name = "bias_correction"
    samples_per_step: int = Field(32, ge=1)

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Correct; the summary has the measured bias of each step and channel, and its mean square.

        Raises:
            StepQuantError: The last layer is not quantized, or its results are not the prediction.
        """
        session.ensure_ranges()
        layer, channels = self._output_layer(session)
        bias = self._bias(session)
        layer.set_step_bias(-bias[:, channels])
        session.summary[self.name] = {
            "mean_square": float(bias.square().mean()),
            "bias": bias.tolist(),
        }

    def _output_layer(self, session: Session) -> tuple[QuantLayer, Tensor]:
        """The last quantized layer, and the prediction's channel of each of its out-channels."""
        data = session.trajectories.subset(1, session.seed)
        outer = sorted(session.adapter.input_output_layers(session.float_model))
        name = execution_order(session.float_model, outer, data)[-1]
        layer = session.layers().get(name)
        channels = None
        if layer is not None:
            channels = channels_of_outputs(session.float_model, name, layer.channel_dim, data)
        if layer is None or channels is None:
            what = "is not quantized" if layer is None else "does not give the prediction itself"
            raise StepQuantError(
                f"step '{self.name}' cannot correct the last layer '{name}', which {what}: "
                "expected a quantized layer whose output is the prediction; leave the step out"
            )
        return layer, channels

    def _bias(self, session: Session) -> Tensor:
        """Mean of the quantized minus the float prediction, `[T, channels]`."""
        rows = []
        steps = len(session.trajectories.timesteps)
        with session.reporter.task("measuring bias", total=steps) as task:
            for row in range(steps):
                whole = session.trajectories.step(row, self.samples_per_step)
                errors = [
                    by_channel(
                        predict(session.model, inputs) - predict(session.float_model, inputs)
                    )
                    for inputs in whole.batches(session.samples_per_step)
                ]
                rows.append(torch.cat(errors, dim=1).mean(dim=1))
                task.advance()
        return torch.stack(rows)


def by_channel(prediction: Tensor) -> Tensor:
    """Arrange `prediction`, an image `[B, C, H, W]` or tokens `[B, N, C]`, as `[C, values]`."""
    return prediction.movedim(channel_dim(prediction), 0).flatten(1)


def channels_of_outputs(
    model: nn.Module, name: str, channel_dim: int, data: Trajectories
) -> Tensor | None:
    """The prediction's channel of each out-channel of the layer `name`.

    Transformers assemble patches behind their last layer, so several of its out-channels belong to
    one channel of the prediction. A probe finds which: it replaces every result of the layer by the
    index of its out-channel, and reads where in the prediction each index arrives.

    Args:
        model: The float denoiser.
        name: Its last layer.
        channel_dim: Dimension of the out-channels in the layer's result.
        data: Inputs of the probe.

    Returns:
        int64 `[C_out]`, or None if the prediction does not consist of the layer's results alone.
    """

    def number(_name: str, _args: Any, _kwargs: Any, result: Tensor) -> Tensor:
        numbers = torch.arange(result.shape[channel_dim], dtype=result.dtype)
        shape = [1] * result.dim()
        shape[channel_dim] = -1
        return numbers.to(result.device).view(shape).expand_as(result).clone()

    layer: Any = model.get_submodule(name)
    with hooked({name: layer}, after=number):
        found = by_channel(predict(model, data))
    count = layer.weight.shape[0]
    members = [row.unique() for row in found]  # out-channels in each channel of the prediction
    if not torch.equal(torch.cat(members).sort().values, torch.arange(count).to(found)):
        return None
    channels = torch.empty(count, dtype=torch.int64)
    for channel, numbers in enumerate(members):
        channels[numbers.long()] = channel
    return channels
