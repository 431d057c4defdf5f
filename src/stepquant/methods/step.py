"""What a step of a recipe is, and the registry of all steps."""

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

# What several steps share in `Step.not_after`: steps that train weights on their grids, and those
# that make up for the errors of all that came before them.
TRAINING = (
    "block_distillation",
    "block_reconstruction",
    "progressive_alignment",
    "trajectory_distillation",
    "relation_distillation",
)
CORRECTED = {
    "bias_correction": "which has corrected errors that it would change",
    "affine_distillation": "which has made up for errors that it would change",
}


class Step(BaseModel):
    """Typed hyper-parameters and one method. Unknown keys are errors.

    `needs_ranges`: False for a step that must come before every step that has it. `trains`: what
    has gradients at once, by which memory is predicted ("affine": biases and norms of the whole
    model). `not_after`: the names of steps that must not come anywhere before this one, because it
    would undo what they did or needs what they have taken away; each with what is wrong, as a
    relative clause. `not_before`: the same for steps that must not come anywhere after this one; a
    step of another package needs it where `not_after` of a step of stepquant cannot name it. A
    recipe in an order that these forbid is refused when it is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    needs_ranges: ClassVar[bool] = True
    trains: ClassVar[Literal["nothing", "blocks", "model", "affine"]] = "nothing"
    not_after: ClassVar[Mapping[str, str]] = {}
    not_before: ClassVar[Mapping[str, str]] = {}

    @property
    def needs_influence(self) -> bool:
        """Whether the step fails where the influence of errors on the image is not known."""
        return False

    def check(self, scheme: Scheme) -> None:
        """An error where the step cannot work with `scheme`; asked before anything is computed."""

    def check_model(self, model: nn.Module, adapter: DenoiserAdapter, scheduler: Any) -> None:
        """An error where the step cannot work with the float `model` or the sampler's `scheduler`.

        Asked before anything is sampled.
        """

    def why_idle(self, scheduler: Any, inputs: Trajectories) -> str | None:
        """Why the step would change nothing with the sampler's `scheduler` and `inputs`, or None.

        Asked before anything is sampled, with what the sampler first calls the denoiser with.
        """
        return None

    def apply(self, session: Session) -> None:
        """Change `session.model`, and say in `session.summary` what was done."""
        raise NotImplementedError


STEPS: Registry[type[Step]] = Registry(
    "step", "stepquant.steps", "stepquant.methods", in_order=True
)
# Sections of a recipe, which `--set` looks at first, and files that a work folder has anyway.
TAKEN = ("scheme", "calibration", "ranges", "trajectories", "image_gradients", "job")

AnyStep = TypeVar("AnyStep", bound=type[Step])


def register_step(step: AnyStep) -> AnyStep:
    """Decorator: make a `Step` known to recipes by its `name`.

    Raises:
        StepQuantError: the class is no `Step`, or its name is missing, taken or not a word of
            lower-case letters, digits and underscores.
    """
    if not (isinstance(step, type) and issubclass(step, Step)):
        raise StepQuantError(f"{step!r} is no step: expected a class that derives from Step")
    name = getattr(step, "name", None)
    if not isinstance(name, str) or not re.fullmatch("[a-z][a-z0-9_]*", name) or name in TAKEN:
        raise StepQuantError(
            f"the name of the step {step.__qualname__} is {name!r}: expected a word of lower-case "
            f"letters, digits and underscores, other than {', '.join(TAKEN)}"
        )
    STEPS.register(name, step, step)
    return step
