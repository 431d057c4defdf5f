"""Time-smoothed Relation Distillation (TRD) of MPQ-DM (arXiv 2412.11549, AAAI 2025).

A second loss beside trajectory distillation. `F` are the features of the last decoder stage,
averaged over a window of consecutive steps of each image, for student and teacher alike. Each row
of `R` relates one pixel `p` to all pixels `q`:

    R   = softmax over q of cos(F_p, F_q) / tau
    L_R = mean over p of KL(R_teacher || R_student)
    L   = L_task + relation_weight L_R

Similarities between pixels say more than single values, and survive quantization better.

Deviations:

- The released code detaches the student's features, so its term has no gradient. Here it has one.
- The released loss is a sum (weight 100). Here it is a mean over pixels.
- The released temperature is 1, at which the softmax over 1,024 pixels is almost uniform. Here the
  default is 0.1.
- The released code updates after each step. Here both steps of a window go into one update. The
  defaults therefore draw half the images in twice the rounds: as many samples and as many updates
  as trajectory distillation.
- `relation: l2` is not the paper's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from stepquant.calibration.trajectories import Trajectories
from stepquant.methods.session import Session
from stepquant.methods.step import register_step
from stepquant.methods.trajectory_distillation import TrajectoryDistillation
from stepquant.models.adapter import DenoiserAdapter
from stepquant.models.calling import call_denoiser
from stepquant.models.hooks import hooked
from stepquant.support.errors import StepQuantError


def relations(features: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the relations of each pixel to all, `[B, P, P]`.

    Each row is a log-softmax over cosines, divided by `temperature`.

    Args:
        features: `[B, C, H, W]` with `P = H * W` pixels, or a transformer's tokens `[B, P, C]`,
            each of which counts as a pixel.
        temperature: The `tau` of the softmax, above 0.
    """
    channels_first = features.flatten(2) if features.dim() == 4 else features.transpose(1, 2)
    pixels = functional.normalize(channels_first, dim=1)  # [B, C, P]
    return functional.log_softmax(pixels.transpose(1, 2) @ pixels / temperature, dim=-1)


def relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over pixels of `KL(teacher || student)` between their relations, a scalar.

    `student` and `teacher` are features of the same shape, see `relations`.
    """
    ours, theirs = relations(student, temperature), relations(teacher, temperature)
    return functional.kl_div(
        ours.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean", log_target=True
    )


@register_step
class RelationDistillation(TrajectoryDistillation):
    """Trajectory distillation with a term for the relations of pixels.

    The summary reports the gradient norms of both losses. The other settings are those of
    `TrajectoryDistillation`; "shuffled" is refused, because features are averaged over consecutive
    steps.

    Attributes:
        rounds: Number of rounds.
        batch: Images per round.
        window: Consecutive steps of each image that features are averaged over.
        relation_weight: Factor of the term beside the task loss.
        temperature: Temperature `tau` of the softmax over cosines.
        relation: "cosine" is the paper's. "l2" matches the averaged features themselves, relative
            to their power, for comparison.
    """

    name = "relation_distillation"
    rounds: int = Field(80, ge=0)
    batch: int = Field(4, ge=1)
    window: int = Field(2, ge=1)
    relation_weight: float = Field(1.0, ge=0)
    temperature: float = Field(0.1, gt=0)
    relation: Literal["cosine", "l2"] = "cosine"

    @model_validator(mode="after")
    def _consecutive(self) -> RelationDistillation:
        if self.step_order == "shuffled":
            raise StepQuantError(
                f"step_order of step '{self.name}' is shuffled: expected mixed or sampler, because "
                "features are averaged over consecutive steps of an image"
            )
        return self

    @torch.no_grad()
    def check_model(self, model: nn.Module, adapter: DenoiserAdapter, scheduler: Any) -> None:
        """Check that the float model returns features with a pixel grid at the adapter's site.

        Raises:
            StepQuantError: It returns none there with three or four dimensions, or the influence of
                errors counts and cannot be traced through `scheduler`.
        """
        super().check_model(model, adapter, scheduler)
        site = adapter.relation_site(model)
        with output_of(model.get_submodule(site)) as found:
            call_denoiser(model, *adapter.random_inputs(model, 1))
        features = found[0] if found else None
        if not isinstance(features, Tensor) or features.dim() not in (3, 4):
            what = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise StepQuantError(
                f"step '{self.name}' found {what} at '{site}': expected features [B, C, H, W] with "
                "a pixel grid or tokens [B, P, C], to compute relations from; use "
                "trajectory_distillation instead"
            )

    def losses(self, session: Session, inputs: Trajectories) -> tuple[Tensor, Tensor | None]:
        """The task loss and the weighted relation term of one window."""
        site = session.adapter.relation_site(session.float_model)
        with (
            output_of(session.model.get_submodule(site)) as student,
            output_of(session.float_model.get_submodule(site)) as teacher,
        ):
            task, _ = super().losses(session, inputs)
        timestep = inputs.timestep
        steps = int((timestep[1:] != timestep[:-1]).sum()) + 1  # the last window may be shorter
        ours, theirs = (smoothed(found[0], steps) for found in (student, teacher))
        if self.relation == "l2":
            term = (ours - theirs).square().mean() / theirs.square().mean()
        else:
            term = relation_loss(ours, theirs, self.temperature)
        return task, self.relation_weight * term


def smoothed(features: Tensor, steps: int) -> Tensor:
    """Mean over a window's steps, `[B, ...]`, of `features [steps * B, ...]`."""
    return features.view(steps, -1, *features.shape[1:]).mean(dim=0)


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A context that collects the outputs of `module`, with their graph, in a list.

    If a block returns text and image tokens, the list holds the image tokens, which are the last.
    """
    found: list[Tensor] = []

    def keep(_name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        found.append(output[-1] if isinstance(output, tuple) else output)

    with hooked({"": module}, after=keep):
        yield found
