"""Trajectory distillation of EfficientDM (He et al., ICLR 2024, arXiv 2310.03270).

Section 3.2 and algorithm 1. All layers are trained together. The float model draws fresh
trajectories from noise, and along them the quantized model `ε̂` learns to predict the noise that
the float model `ε` predicts; no data are needed:

    L = || ε̂(x_t, t) - ε(x_t, t) ||^2 / || ε(x_t, t) ||^2

Deviations:

- Steps are mixed, not in the sampler's order, which had the higher held-out loss on the embedded
  model (`benchmarks/mixed_bits.py` compares both).
- Adam instead of AdamW.
- Learning rates are relative to each quantizer's grid and decay along a cosine. The paper's rates
  of scales are absolute (1e-6 for weights, 5e-4 for activations) and decay linearly.
- Weight zero points are not trained.
- The loss is relative to the prediction's power.
- The state with the lowest task loss on held-out inputs is kept, so the step never raises it. That
  loss is a ratio of sums over all steps; most of it comes from the late ones.
- `self_sampled` and `influence_exponent` are not the paper's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stepquant.calibration.influence import check_without_memory, weighted_power
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, Step, register_step
from stepquant.methods.training.layer_optimizer import LayerOptimizer, Optimizer
from stepquant.models.adapter import DenoiserAdapter
from stepquant.support.errors import StepQuantError

HELD_OUT = 128  # calibration inputs, spread over the steps
SECONDS_BETWEEN_SAVES = 20.0
CHECKS = 8  # measurements of the held-out loss, evenly over the training


@register_step
class TrajectoryDistillation(Step):
    """Train all layers together to predict the float model's noise on its own trajectories.

    The three rates are in grid steps per iteration, before the cosine decay, as in block
    distillation. Defaults are chosen by held-out loss, for far fewer iterations than the paper's.

    Held-out inputs are calibration inputs; in self-sampled rounds, inputs from other trajectories
    that the model draws itself at that time.

    Attributes:
        rounds: Number of rounds. Each draws new images and trains on their steps.
        batch: Images per round.
        window: Consecutive steps of each image in one optimizer step.
        step_order: "mixed" shuffles the windows of a round. "sampler" follows the order of the
            sampler, as EfficientDM trains. "shuffled" takes `batch * window` inputs of any steps
            and images of the round into each optimizer step.
        self_sampled: Share of rounds, at the end, whose trajectories the quantized model draws
            itself. It then learns on the inputs that it meets, its own errors included. This is the
            exposure bias that TCAQ-DM's progressive reconstruction addresses; not in EfficientDM.
        weight_rate: How far a weight moves. Where layers have low-rank adapters, the rate of these
            (the paper's scale-aware rate is 1/2500).
        scale_rate: How far the end of a weight range moves.
        activation_rate: How far the end of an activation range, and the zero point, moves.
        influence_exponent: Above 0, the squared error is weighted by its influence on the image to
            this power, by step and frequency (`calibration.influence`). 0 is the paper's loss.
    """

    name = "trajectory_distillation"
    trains = "model"
    not_after: ClassVar[Mapping[str, str]] = CORRECTED
    rounds: int = Field(40, ge=0)
    batch: int = Field(8, ge=1)
    window: int = Field(1, ge=1)
    step_order: Literal["sampler", "mixed", "shuffled"] = "mixed"
    self_sampled: float = Field(0.0, ge=0, le=1)
    weight_rate: float = Field(0.02, ge=0)
    scale_rate: float = Field(0.02, ge=0)
    activation_rate: float = Field(0.02, ge=0)
    influence_exponent: float = Field(0.0, ge=0, le=1)

    @property
    def needs_influence(self) -> bool:
        """True if errors are weighted by their influence."""
        return self.influence_exponent > 0

    def check_model(self, model: nn.Module, adapter: DenoiserAdapter, scheduler: Any) -> None:
        """Check that the sampler allows the influence of errors to be traced, where it counts.

        Raises:
            StepQuantError: `influence_exponent` is above 0, and a step of `scheduler` depends on
                more than its own input (any other than DDIM and DDPM).
        """
        if self.influence_exponent > 0:
            check_without_memory(scheduler)

    def apply(self, session: Session) -> None:
        """Train; the summary has the held-out losses over time.

        The work folder keeps the training's state every `SECONDS_BETWEEN_SAVES`, so that an
        interrupted run can resume.

        Raises:
            StepQuantError: The loss is not finite.
        """
        session.ensure_ranges()
        layers = list(session.layers().values())
        per_round = math.ceil(len(session.trajectories.timesteps) / self.window)
        optimizer = LayerOptimizer(
            layers,
            self.weight_rate,
            self.scale_rate,
            self.activation_rate,
            max(1, self.rounds * per_round),
        )
        training = Training(session.model, optimizer)
        turn = self.rounds - math.ceil(self.self_sampled * self.rounds)
        kept = session.work.load(self.name)
        if kept is None:
            training.check(self._held_out_loss(session, own=False))
        else:
            training.load(kept, per_round)
        every = max(1, self.rounds // CHECKS)
        saved = time.monotonic()
        with session.reporter.task("distilling trajectories", total=self.rounds) as task:
            task.advance(training.rounds, f"loss {training.losses[-1]:.2e}", resumed=True)
            while training.rounds < self.rounds:
                own = training.rounds >= turn
                if training.rounds == turn:  # from here on, other inputs are held out
                    session.model.load_state_dict(training.best)
                    training.compare_anew(self._held_out_loss(session, own))
                self._train_round(session, training, own, measure=training.rounds % every == 0)
                training.rounds += 1
                if training.rounds % every == 0 or training.rounds in (turn, self.rounds):
                    training.check(self._held_out_loss(session, own))
                if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                    session.work.save(self.name, training.state())
                    saved = time.monotonic()
                task.advance(note=f"loss {training.losses[-1]:.2e}")
        session.work.save(self.name, training.state())
        session.model.load_state_dict(training.best)
        for layer in layers:
            for parameter in layer.parameters():
                parameter.grad = None
            layer.merge_adapter()
        session.summary[self.name] = {
            "loss_before": training.losses[training.compared_from],
            "loss_after": min(training.losses[training.compared_from :]),
            "losses": training.losses,
            "self_sampled_from": training.compared_from,
            "updates": self.rounds * per_round,
            "gradient_norms": [
                dict(zip(("task", "term"), row, strict=True)) for row in training.norms
            ],
        }

    def losses(self, session: Session, inputs: Trajectories) -> tuple[Tensor, Tensor | None]:
        """`(task loss, further term or None)` on the `inputs` of one optimizer step.

        The task loss is the squared error of the predicted noise, weighted by its influence, over
        the mean square of the float prediction. Subclasses add a term.
        """
        with torch.no_grad():
            target = predict(session.float_model, inputs)
        error = predict(session.model, inputs) - target
        loss = self._power(session, error, inputs.timestep).mean() / target.square().mean()
        return loss, None

    def _power(self, session: Session, error: Tensor, timestep: Tensor) -> Tensor:
        """Mean square of each `error [B, C, H, W]`, weighted by its influence, `[B]`.

        `timestep [B]` are the errors' steps.
        """
        if self.influence_exponent == 0:
            return error.square().flatten(1).mean(dim=1)
        spectrum = session.influence(self.influence_exponent)
        return weighted_power(error, spectrum[session.context.grid.rows(timestep)])

    def _train_round(self, session: Session, training: Training, own: bool, measure: bool) -> None:
        """Draw new trajectories and take one optimizer step for each of their windows.

        `own`: the quantized model draws them, otherwise the float model. `measure`: note the
        gradient norms on the first window, if there is a further term.
        """
        data = session.draw(
            self.batch,
            session.seed + 3_000_000 + training.rounds * self.batch,
            session.model if own else None,
        )
        for window in self._windows(data, session.seed * 7919 + training.rounds):
            inputs = data.take(window)
            task, term = self.losses(session, inputs)
            loss = task if term is None else task + term
            if not torch.isfinite(loss):
                raise StepQuantError(
                    f"the loss is {loss.item()} at timestep {inputs.timestep[0].item():g} in step "
                    f"'{self.name}': expected a finite number; lower the learning rates or check "
                    "the float model"
                )
            if measure and term is not None:
                training.measure(task, term)
                measure = False
            training.optimizer.zero_grad()
            loss.backward()
            training.optimizer.step()

    def _windows(self, data: Trajectories, seed: int) -> Iterator[Tensor]:
        """Indices of the inputs of each optimizer step, `[window * B]`.

        They lie step by step, with the same images at each step. With "shuffled", they are any
        inputs of the round.
        """
        generator = torch.Generator().manual_seed(seed)
        if self.step_order == "shuffled":
            per_step = len(data) // len(data.timesteps)  # with guidance, two inputs per image
            order = torch.randperm(len(data), generator=generator)
            yield from order.split(self.window * per_step)
            return
        rows = [(data.timestep == step).nonzero().flatten() for step in data.timesteps]
        starts = list(range(0, len(rows), self.window))
        if self.step_order == "mixed":
            order = torch.randperm(len(starts), generator=generator)
            starts = [starts[index] for index in order.tolist()]
        for start in starts:
            yield torch.cat(rows[start : start + self.window])

    @torch.no_grad()
    def _held_out_loss(self, session: Session, own: bool) -> float:
        """The task loss on inputs that are not trained on.

        These are calibration inputs, or with `own` inputs from trajectories that the quantized
        model draws.
        """
        data = session.trajectories
        if own:
            images = math.ceil(HELD_OUT / len(data.timesteps))
            data = session.draw(images, session.seed + 2_000_000, session.model)
        data = data.subset(HELD_OUT, session.seed)
        error = power = 0.0
        for start in range(0, len(data), HELD_OUT // 4):
            part = data.take(slice(start, start + HELD_OUT // 4))
            target = predict(session.float_model, part)
            found = predict(session.model, part)
            error += float(self._power(session, found - target, part.timestep).sum())
            power += float(self._power(session, target, part.timestep).sum())
        return error / max(power, 1e-12)


@dataclass
class Training:
    """The resumable state of a training run.

    Attributes:
        model: The module that is trained.
        optimizer: Its optimizer.
        rounds: Finished rounds.
        losses: Held-out losses so far.
        compared_from: Index of the first loss that `best` is chosen by.
        best: State with the lowest of these losses.
        norms: Measured gradient norms, `(task loss, further term)`.
    """

    model: nn.Module
    optimizer: Optimizer
    rounds: int = 0
    losses: list[float] = field(default_factory=list)
    compared_from: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    norms: list[tuple[float, float]] = field(default_factory=list)

    def check(self, loss: float) -> None:
        """Append a held-out loss, and keep the state if the loss is the lowest."""
        compared = self.losses[self.compared_from :]
        if not compared or loss < min(compared):
            self.best = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.losses.append(loss)

    def compare_anew(self, loss: float) -> None:
        """Compare from now on with `loss` only: earlier losses were measured on other inputs."""
        self.compared_from = len(self.losses)
        self.check(loss)

    def measure(self, task: Tensor, term: Tensor) -> None:
        """Note the gradient norms of both losses; parameters keep their gradients."""
        parameters = self.optimizer.parameters()
        norms = []
        for loss in (task, term):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            found = [gradient.norm() for gradient in gradients if gradient is not None]
            norms.append(float(torch.stack(found).norm()) if found else 0.0)
        self.norms.append((norms[0], norms[1]))

    def state(self) -> dict[str, Tensor]:
        """The whole state as named tensors, for the work folder."""
        tensors = {f"model/{key}": value for key, value in self.model.state_dict().items()}
        tensors |= {f"best/{key}": value for key, value in self.best.items()}
        tensors |= {f"optimizer/{key}": value for key, value in self.optimizer.state().items()}
        tensors["rounds"] = torch.tensor(self.rounds)
        tensors["compared_from"] = torch.tensor(self.compared_from)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["norms"] = torch.tensor(self.norms, dtype=torch.float64).view(-1, 2)
        return tensors

    def load(self, tensors: dict[str, Tensor], updates_per_round: int) -> None:
        """Restore what `state` returned; every round had `updates_per_round` optimizer steps."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            if key:
                parts[part][key] = tensor
        self.rounds = int(tensors["rounds"])
        self.compared_from = int(tensors["compared_from"])
        self.losses = tensors["losses"].tolist()
        self.norms = [(task, term) for task, term in tensors["norms"].tolist()]
        self.best = parts["best"]
        self.model.load_state_dict(parts["model"])
        self.optimizer.load_state(parts["optimizer"], self.rounds * updates_per_round)
