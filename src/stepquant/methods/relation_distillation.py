"""Time-smoothed Relation Distillation (TRD): MPQ-DM (AAAI 2025, arXiv 2412.11549).

Beside the noise, the quantized denoiser learns how the pixels of the float model's last features
relate to one another: which pixels are alike says more than single values, and survives
quantization better.
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
    """Log-probabilities `[B, P, P]` of each pixel's likeness to all, from `features [B, C, H, W]`.

    Row by row a softmax over cosines; `P = H * W`. Of a transformer's features `[B, P, C]` each
    token is a pixel.
    """
    channels_first = features.flatten(2) if features.dim() == 4 else features.transpose(1, 2)
    pixels = functional.normalize(channels_first, dim=1)  # [B, C, P]
    return functional.log_softmax(pixels.transpose(1, 2) @ pixels / temperature, dim=-1)


def relation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over pixels of `KL(teacher || student)` of their relations, of features alike."""
    ours, theirs = relations(student, temperature), relations(teacher, temperature)
    return functional.kl_div(
        ours.flatten(0, 1), theirs.flatten(0, 1), reduction="batchmean", log_target=True
    )


@register_step
class RelationDistillation(TrajectoryDistillation):
    """Trajectory distillation with a term for the relations of pixels.

    The features are the output of the last decoder stage, averaged over the `window` consecutive
    steps of each image, for student and teacher alike. `relation_weight` times the term is added to
    the task loss; `temperature` is that of the softmax over cosines. `relation`: "cosine" is the
    paper's; "l2" matches the same averaged features themselves (over their power), to compare with.
    The summary reports the gradient norms of both losses.

    Deviations: the released code detaches the student's features, so that its term has no gradient;
    here it has. Its loss is a sum (weight 100) and its temperature 1, at which the softmax over
    1,024 pixels is almost uniform; here the term is a mean over pixels, and the default temperature
    is 0.1. The released code updates after each step; here both steps of a window go into one
    update, so that the default is half the images in twice the rounds: as many samples and as many
    updates as trajectory distillation has.
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
        """The float model must give features with a pixel grid where the adapter says."""
        super().check_model(model, adapter, scheduler)
        site = adapter.relation_site(model)
        with output_of(model.get_submodule(site)) as found:
            call_denoiser(model, *adapter.random_inputs(model, 1))
        features = found[0] if found else None
        if not isinstance(features, Tensor) or features.dim() not in (3, 4):
            what = tuple(features.shape) if isinstance(features, Tensor) else type(features)
            raise StepQuantError(
                f"step '{self.name}' found {what} at '{site}': expected features [B, C, H, W] "
                "with a pixel grid or tokens [B, P, C], which relations are taken of; use "
                "trajectory_distillation"
            )

    def losses(self, session: Session, inputs: Trajectories) -> tuple[Tensor, Tensor | None]:
        """The task loss and the weighted relation term."""
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
    """The mean over a window's steps, `[B, ...]`, of `features [steps * B, ...]`."""
    return features.view(steps, -1, *features.shape[1:]).mean(dim=0)


@contextmanager
def output_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds the outputs of `module`, with their graph, while the context lasts.

    Of a block that gives text and image tokens, the image's, which are the last.
    """
    found: list[Tensor] = []

    def keep(_name: str, _args: Any, _kwargs: Any, output: Any) -> None:
        found.append(output[-1] if isinstance(output, tuple) else output)

    with hooked({"": module}, after=keep):
        yield found
