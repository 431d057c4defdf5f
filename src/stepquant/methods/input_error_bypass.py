"""Input error bypass: what the input layer's grid loses of the sample passes by the denoiser.

Ours, from no paper. The layer that reads the sampler's sample `x` rounds it, and cuts off what lies
outside its grid: noise is drawn anew for every image, and some pixel begins beyond all that
calibration has seen. To the network behind the grid this error `e = x - x̂` is noise that it does
not see; so it stays in the sample, and the steps add it up, by `1 / sqrt(ᾱ_T)` at the worst, 150
times with the usual schedule, until a pixel runs away. But `e` is known at once, and so is what the
float model answers to a little noise: a multiple of it, `prediction += slope_t e`. The sample is
rounded once more for each call; nothing is trained.

For a model that predicts noise the slope is `1 / sqrt(1 - ᾱ_t)` as long as there is much more noise
than `e`, and less in the last steps, where `e` may as well be of the image. It is measured, step by
step, so that it fits any scheduler and whatever the model predicts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from stepquant.calibration.trajectories import predict
from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, Step, register_step
from stepquant.models.calling import channel_dim
from stepquant.models.hooks import hooked
from stepquant.models.input_bypass import InputBypass, common_channels
from stepquant.quantizers import QuantLayer


@register_step
class InputErrorBypass(Step):
    """Add to the prediction what the float model would have answered to the input layer's error.

    `samples_per_step`: images whose inputs the slope is measured with, by least squares over all
    their positions, `sum(e (f(x) - f(x̂))) / sum(e e)` for the float model `f`. Does nothing, and
    says so, where not exactly one quantized layer reads the sample, or sample and prediction differ
    in more than their channels. It stands before steps that train through the whole model or that
    correct it, because they see the predictions; to their gradients it is a constant. Where they
    change the layer's grid, the slope stays that of the first one, and the error that it multiplies
    is that of the new one.
    """

    name = "input_error_bypass"
    not_after = CORRECTED | dict.fromkeys(
        ("trajectory_distillation", "relation_distillation"),
        "which has trained the predictions as they are without it",
    )
    samples_per_step: int = Field(16, ge=1)

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Attach the bypass; the summary names the layer and has the slope of each step."""
        session.ensure_ranges()
        readers, alike = sample_readers(session)
        reason = None
        if len(readers) != 1:
            reason = f"{len(readers)} quantized layers read the sample, and it takes exactly one"
        elif not alike:
            reason = "sample and prediction differ in more than their channels"
        if reason is not None:
            session.reporter.line(f"step '{self.name}' does nothing here: {reason}")
            session.summary[self.name] = {"nothing_because": reason}
            return
        slopes = self._measured(session, session.layers()[readers[0]])
        InputBypass(readers[0]).attach(session.model, slopes)
        session.summary[self.name] = {"layer": readers[0], "slopes": slopes.tolist()}

    def _measured(self, session: Session, layer: QuantLayer) -> Tensor:
        """The slope of each step, float32 `[T]`; 0 where the grid loses nothing."""
        steps = len(session.trajectories.timesteps)
        products, powers = torch.zeros(2, steps, dtype=torch.float64)
        with session.reporter.task("measuring the input's errors", total=steps) as task:
            for row in range(steps):
                whole = session.trajectories.step(row, self.samples_per_step)
                for inputs in whole.batches(session.samples_per_step):
                    session.context.set_timestep(inputs.timestep)
                    error = layer.input_error(inputs.sample)
                    held = replace(inputs, sample=inputs.sample - error)
                    f = session.float_model
                    change = predict(f, inputs) - predict(f, held)
                    error, change = (t.double() for t in common_channels(error, change))
                    products[row] += (error * change).sum()
                    powers[row] += error.square().sum()
                task.advance()
        return torch.where(powers > 0, products / powers.clamp(min=1e-300), 0.0).float()


@torch.no_grad()
def sample_readers(session: Session) -> tuple[list[str], bool]:
    """The quantized layers whose input is the sampler's sample itself, by name.

    And whether the prediction has the shape of the sample, but for the number of channels.
    """
    inputs = session.trajectories.step(0, 1)
    found: dict[str, None] = {}  # in the order of the calls, each once

    def look(name: str, args: tuple[Tensor, ...], _: dict[str, Any]) -> None:
        if torch.equal(args[0], inputs.sample):
            found[name] = None

    with hooked(session.layers(), before=look):
        prediction = predict(session.model, inputs)
    shapes = []
    for tensor in (inputs.sample, prediction):
        shape: list[int | None] = list(tensor.shape)
        shape[channel_dim(tensor)] = None
        shapes.append(shape)
    return list(found), shapes[0] == shapes[1]
