"""The base class of a recipe's steps, and their registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from stepquant.calibration.trajectories import Trajectories
from stepquant.methods.session import Session
from stepquant.models.adapter import DenoiserAdapter
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError
from stepquant.support.registry import Registry

# Shared entries of `Step.not_after`: steps that train weights on their grids, and steps that
# compensate for the errors of all steps before them.
TRAINING = (
    "block_distillation",
    "block_reconstruction",
    "progressive_alignment",
    "trajectory_distillation",
    "relation_distillation",
)
CORRECTED = {
    "bias_correction": "which corrects the errors of all steps before it",
    "affine_distillation": "which compensates for the errors of all steps before it",
}


class Step(BaseModel):
    """One step of a recipe: typed hyper-parameters and `apply`. Unknown keys are errors.

    Reading a recipe fails if its order violates `needs_ranges`, `not_after` or `not_before`.

    Attributes:
        name: the step's name in recipes, a class variable of each subclass.
        needs_ranges: whether the step works on quantizers with ranges. Steps with False must come
            before all steps with True.
        trains: the part of the model that has gradients at the same time ("affine": biases and
            norms of the whole model). The prediction of memory depends on it.
        not_after: names of steps that must not come anywhere before this one, because this step
            would undo them or needs something that they remove. Each maps to the reason, a relative
            clause for the error message.
        not_before: the same for steps that must not come anywhere after this one. Steps of other
            packages need it, because `not_after` of a step in stepquant cannot name them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    needs_ranges: ClassVar[bool] = True
    trains: ClassVar[Literal["nothing", "blocks", "model", "affine"]] = "nothing"
    not_after: ClassVar[Mapping[str, str]] = {}
    not_before: ClassVar[Mapping[str, str]] = {}

    @property
    def needs_influence(self) -> bool:
        """Whether the step uses the influence of prediction errors on the image.

        Such a step fails if the influence cannot be computed, see `Session.image_gradients`.
        """
        return False

    def check(self, scheme: Scheme) -> None:
        """Refuse a `scheme` that the step cannot work with, before anything is computed.

        Raises:
            StepQuantError: the step cannot work with `scheme`.
        """

    def check_model(self, model: nn.Module, adapter: DenoiserAdapter, scheduler: Any) -> None:
        """Refuse a float `model` or a `scheduler` of the sampler before anything is sampled.

        Raises:
            StepQuantError: the step cannot work with `model` or `scheduler`.
        """

    def why_idle(self, scheduler: Any, inputs: Trajectories) -> str | None:
        """The reason why the step would change nothing, as a clause, or None if it has an effect.

        Called before anything is sampled, with the sampler's `scheduler` and the `inputs` of its
        first call of the denoiser.
        """
        return None

    def apply(self, session: Session) -> None:
        """Change `session.model` in place and report the result in `session.summary`."""
        raise NotImplementedError


STEPS: Registry[type[Step]] = Registry(
    "step", "stepquant.steps", "stepquant.methods", in_order=True
)
# Reserved: sections of a recipe, which `--set` looks up first, and files of every work folder.
TAKEN = ("scheme", "calibration", "ranges", "trajectories", "image_gradients", "job")

AnyStep = TypeVar("AnyStep", bound=type[Step])


def register_step(step: AnyStep) -> AnyStep:
    """Decorator that registers a `Step` under its `name`, for use in recipes.

    Raises:
        StepQuantError: the class does not derive from `Step`, or its name is missing, taken,
            reserved or not a word of lower-case letters, digits and underscores.
    """
    if not (isinstance(step, type) and issubclass(step, Step)):
        raise StepQuantError(f"{step!r} is not a step: expected a class that derives from Step")
    name = getattr(step, "name", None)
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name) or name in TAKEN:
        raise StepQuantError(
            f"the name of the step {step.__qualname__} is {name!r}: expected a word of lower-case "
            f"letters, digits and underscores, other than {', '.join(TAKEN)}"
        )
    STEPS.register(name, step, step)
    return step
