"""Affine distillation: train biases and norms end to end, by the error that reaches the image.

Ours, from no paper. Training block by block has made the errors of single blocks small. The rest
adds up over blocks and over the sampler's steps, and not all errors count the same: at the first
steps an error that is even over the image changes it far more than one that varies from pixel to
pixel. The loss of a trajectory covers both:

    L = mean over f of | mean over t of S[t, f]^(x/2) (F e_t)[f] |^2

- `e_t`: error of the prediction at each of `steps_together` random steps `t`,
- `F`: Fourier transform over the image,
- `S`: influence on the image of an error of that step and frequency (`calibration.influence`),
- `x`: the `influence_exponent`.

The losses of trajectories and channels are averaged. Codes stay frozen: blocks compensate for each
other's rounding, and a small step of all weights flips many codes.

PTQD (NeurIPS 2023) corrects the mean error of the prediction step by step. Here the errors are
those of each image, at all frequencies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from stepquant.calibration.guidance import mixed
from stepquant.calibration.influence import MIXED, shared_power, why_not_followed
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, Step, register_step
from stepquant.methods.training.guarded_block import is_check
from stepquant.methods.training.layer_optimizer import AdamOptimizer
from stepquant.methods.training.steps_together import (
    check_together,
    coherent_batches,
    coherent_inputs,
    held_out_groups,
    of_all_kinds,
    steps_of_each,
)
from stepquant.methods.trajectory_distillation import SECONDS_BETWEEN_SAVES, Training
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError


@register_step
class AffineDistillation(Step):
    """Train biases and the gains and biases of norms, all layers together; codes stay frozen.

    Trained are the biases of quantized layers, and gains and biases of `GroupNorm` and `LayerNorm`.
    Layers that stay float keep theirs. The state with the lowest loss on held-out trajectories is
    kept, so the step never raises that loss. The summary has the held-out losses, relative to the
    mean of `S^x |F y|^2` over single steps of the float prediction `y`.

    With classifier-free guidance, the prediction is the mix that the sampler follows, and a batch
    has half as many images.

    The step does nothing, and says so, in two cases:

    - The influence of a step is unknown: samplers other than DDIM and DDPM, or guidance whose mix
      cannot be determined. Without it the last steps would decide: their errors are the largest,
      and do the least to the image.
    - There is nothing to train.

    Attributes:
        iterations: Optimizer steps.
        batch: Most inputs per optimizer step, those of `batch // steps_together` trajectories.
        samples: Calibration inputs in all; an eighth is held out. They are whole trajectories, or
            some steps of each where conditions differ.
        steps_together: Steps of each trajectory whose errors are averaged before they are squared.
        rate: Learning rate of Adam, in the unit of biases and gains; it falls along a cosine.
        influence_exponent: The exponent `x` of the influence.
    """

    name = "affine_distillation"
    trains = "affine"
    not_after: ClassVar[Mapping[str, str]] = {"bias_correction": CORRECTED["bias_correction"]}
    iterations: int = Field(300, ge=0)
    batch: int = Field(32, ge=1)
    samples: int = Field(1600, ge=16)
    steps_together: int = Field(8, ge=1)
    rate: float = Field(3e-4, ge=0)
    influence_exponent: float = Field(1.0, gt=0, le=1)

    def check(self, scheme: Scheme) -> None:
        """Check the settings of the batches.

        Raises:
            StepQuantError: `steps_together` exceeds `batch`.
        """
        check_together(self.name, self.steps_together, self.batch)

    def why_idle(self, scheduler: Any, inputs: Trajectories) -> str | None:
        """Why a step's influence cannot be traced with this sampler, whatever its mix, or None."""
        return why_not_followed(scheduler, inputs)

    def apply(self, session: Session) -> None:
        """Train; the summary has the held-out losses over time, or why nothing was trained.

        Raises:
            StepQuantError: There are too few calibration trajectories, or the loss is not finite.
        """
        session.ensure_ranges()
        parameters = affine_parameters(session)
        reason = self.why_idle(session.scheduler, session.trajectories)
        if reason is None and session.mixing is None:
            reason = MIXED
        if reason is None and not parameters:
            reason = "no quantized layer has a bias, and there is no norm with gains"
        if reason is not None:
            session.reporter.line(f"step '{self.name}' does nothing here: {reason}")
            session.summary[self.name] = {"nothing_because": reason}
            return
        assert session.mixing is not None
        for layer in session.layers().values():
            layer.merge_adapter()
        with only_gradients_of(session.model, parameters):
            losses = self._train(session, parameters, session.mixing)
        session.summary[self.name] = {
            "loss_before": losses[0],
            "loss_after": min(losses),
            "losses": losses,
            "values": sum(parameter.numel() for parameter in parameters),
        }

    def _train(
        self, session: Session, parameters: list[nn.Parameter], mixing: Tensor
    ) -> list[float]:
        """Train `parameters` and leave them in their best state; returns the held-out losses.

        `mixing [kinds]` are the weights of an image's predictions in the mix.
        """
        found, kinds = session.trajectories, len(mixing)
        data = coherent_inputs(found, self.samples, self.steps_together, self.name, session.seed)
        steps = steps_of_each(found, self.samples, self.steps_together)
        together, images = min(self.steps_together, steps), len(data) // (steps * kinds)
        kept = images - max(1, images // 8)
        generator = torch.Generator().manual_seed(session.seed)
        held_out = held_out_groups(torch.arange(kept, images), steps, together, generator)
        batch = max(together, self.batch // kinds)
        order = coherent_batches(kept, steps, together, batch, self.iterations, generator)

        def inputs(index: Tensor) -> Trajectories:
            return data.take(of_all_kinds(index, steps, kinds))

        optimizer = AdamOptimizer(parameters, self.rate, max(1, self.iterations))
        training = Training(nn.ParameterList(parameters), optimizer)
        power = self._power(session, inputs(held_out), mixing)
        chunk = max(1, 2 * batch // together) * together

        @torch.no_grad()
        def check() -> None:
            total = sum(
                float(self._loss(session, inputs(index), together, mixing)) * len(index)
                for index in held_out.split(chunk)
            )
            training.check(total / len(held_out) / power)

        stored = session.work.load(self.name)
        if stored is None:
            check()
        else:
            training.load(stored, 1)
        saved = time.monotonic()
        with session.reporter.task("distilling biases and norms", total=self.iterations) as task:
            task.advance(training.rounds, f"loss {training.losses[-1]:.2e}", resumed=True)
            for number in range(training.rounds, self.iterations):
                loss = self._loss(session, inputs(order[number]), together, mixing)
                if not torch.isfinite(loss):
                    raise StepQuantError(
                        f"the loss is {loss.item()} at iteration {number} of step '{self.name}': "
                        "expected a finite number; lower the rate or check the float model"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                training.rounds += 1
                if is_check(number, self.iterations):
                    check()
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    session.work.save(self.name, training.state())
                    saved = time.monotonic()
                task.advance(note=f"loss {training.losses[-1]:.2e}")
        session.work.save(self.name, training.state())
        training.model.load_state_dict(training.best)
        return training.losses

    def _loss(
        self, session: Session, inputs: Trajectories, together: int, mixing: Tensor
    ) -> Tensor:
        """Loss on `inputs`, a scalar, before it is divided by the power of the float prediction.

        `inputs` are groups of `together` steps of one trajectory. At each step they hold all inputs
        of the image, whose predictions the weights `mixing [kinds]` mix.
        """
        with torch.no_grad():
            target = predict(session.float_model, inputs)
        # torch 2.13 crashes the process in a norm whose weight needs a gradient and whose input is
        # channels last and needs none. Features computed from the sample may be channels last.
        inputs.sample.requires_grad_(torch.is_grad_enabled())
        error = mixed(predict(session.model, inputs) - target, mixing)
        error = error[:, : inputs.sample.shape[1]]  # further channels may predict the variance
        return shared_power(error, self._spectrum(session, inputs, mixing), together)

    @torch.no_grad()
    def _power(self, session: Session, inputs: Trajectories, mixing: Tensor) -> float:
        """Weighted mean square of the float prediction at single steps; at least 1e-12."""
        total = 0.0
        for part in inputs.batches(max(1, 2 * self.batch // len(mixing)) * len(mixing)):
            target = mixed(predict(session.float_model, part), mixing)[:, : part.sample.shape[1]]
            total += float(shared_power(target, self._spectrum(session, part, mixing), 1)) * len(
                part
            )
        return max(total / len(inputs), 1e-12)

    def _spectrum(self, session: Session, inputs: Trajectories, mixing: Tensor) -> Tensor:
        """Influence at the step of each image of `inputs`, `[B, H, W]`, to the exponent."""
        spectrum = session.influence(self.influence_exponent)
        return spectrum[session.context.grid.rows(inputs.timestep[:: len(mixing)])]


def affine_parameters(session: Session) -> list[nn.Parameter]:
    """Biases of the quantized layers, then gains and biases of the norms, each parameter once."""
    found = [layer.bias for layer in session.layers().values() if layer.bias is not None]
    for module in session.model.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            found += [value for value in (module.weight, module.bias) if value is not None]
    return list(dict.fromkeys(found))


@contextmanager
def only_gradients_of(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """A context in which only `parameters` of `model` can have gradients.

    On exit, all `requires_grad` flags are as before, and no gradient is left.
    """
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
