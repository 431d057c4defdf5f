"""Bias correction of the prediction: PTQD (He et al., NeurIPS 2023, arXiv 2305.10657), section 4.

Rounding and clipping shift the mean of what the model predicts. Steps that are shifted the same way
add up over the sampler, until the images are too dark or too bright.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stepquant.calibration.capture import capture_outputs, execution_order
from stepquant.calibration.trajectories import predict
from stepquant.errors import StepQuantError
from stepquant.methods.step import Step
from stepquant.quantizers import QuantLayer
from stepquant.session import Session


class BiasCorrection(Step):
    """Take off, at each step, the mean error of each channel of the prediction.

    The mean is over all positions of `samples_per_step` images' inputs. It becomes part of the
    output layer's bias, with a row for each step, so that nothing is computed in addition. A step
    that trains or changes grids is refused after it: the correction would be of errors that the
    model has not any more.

    Deviations: PTQD also scales the prediction for the part of the error that goes along with it,
    and lowers the variance of a stochastic sampler by that of the rest; neither is done here. Its
    correction acts on the sampler; here it is part of the model, for any sampler.
    """

    name = "bias_correction"
    samples_per_step: int = Field(32, ge=1)

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Correct; the summary has the bias that was there, step by step, and its mean square."""
        session.ensure_ranges()
        layer = self._output_layer(session)
        bias = self._bias(session, layer.channel_dim)
        layer.set_step_bias(-bias)
        session.summary[self.name] = {
            "mean_square": float(bias.square().mean()),
            "bias": bias.tolist(),
        }

    def _output_layer(self, session: Session) -> QuantLayer:
        """The quantized layer whose result is the prediction."""
        data = session.trajectories.subset(1, session.seed)
        outer = sorted(session.adapter.input_output_layers(session.float_model))
        name = execution_order(session.float_model, outer, data)[-1]
        result = capture_outputs(session.float_model, [name], data, 1)[name]
        prediction = predict(session.float_model, data)
        layer = session.layers().get(name)
        if layer is None or not torch.equal(result, prediction):
            what = "is not quantized" if layer is None else "does not give the prediction itself"
            raise StepQuantError(
                f"step '{self.name}' finds that the last layer '{name}' {what}: expected a "
                "quantized layer whose result is the prediction; leave the step out"
            )
        return layer

    def _bias(self, session: Session, channel_dim: int) -> Tensor:
        """Mean of the quantized less the float prediction, `[T, channels]`."""
        rows = []
        steps = len(session.trajectories.timesteps)
        with session.reporter.task("measuring bias", total=steps) as task:
            for row in range(steps):
                inputs = session.trajectories.step(row, self.samples_per_step)
                ours, theirs = (
                    predict(model, inputs) for model in (session.model, session.float_model)
                )
                error = (ours - theirs).movedim(channel_dim, 0)  # a conv's are [B, C, H, W]
                rows.append(error.flatten(1).mean(dim=1))
                task.advance()
        return torch.stack(rows)
