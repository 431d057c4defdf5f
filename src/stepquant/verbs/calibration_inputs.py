"""What a recipe is calibrated with: the scheduler, and the trajectories that it draws."""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DiffusionPipeline

from stepquant.calibration.influence import check_unguided
from stepquant.calibration.trajectories import Trajectories, capture_trajectories
from stepquant.methods.recipe import Recipe
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.sampling import needs_own_scheduler
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder


def calibrated_scheduler(sampler: DiffusionPipeline, steps: int) -> Any:
    """A copy of the sampler's scheduler, set to `steps` steps."""
    scheduler = copy.deepcopy(sampler.scheduler)
    # Timesteps of flow matching may depend on the size of the image.
    if not needs_own_scheduler(sampler):
        scheduler.set_timesteps(steps)
    return scheduler


def with_own_scheduler(
    pipeline: DiffusionPipeline, recipe: Recipe, settings: dict[str, Any] | None
) -> tuple[Recipe, str | None]:
    """The recipe with the pipeline's scheduler where its ddim cannot be meant, and a remark.

    DDIM is for models that predict noise; a recipe has it for want of anything better. What the
    caller asks for by name is left, and refused later.
    """
    key = "calibration.scheduler"
    asked = key in (settings or {}) or recipe.calibration.scheduler != "ddim"
    if asked or not needs_own_scheduler(pipeline):
        return recipe, None
    own = type(pipeline.scheduler).__name__
    return recipe.override({key: None}), (
        f"calibrating with the pipeline's own {own}: ddim is for models that predict noise"
    )


def calibration_trajectories(
    pipeline: DiffusionPipeline,
    recipe: Recipe,
    seed: int,
    reporter: Reporter,
    work: WorkFolder,
    conditioning: Conditioning,
) -> Trajectories:
    """What the sampler meets on its way, drawn anew or read from `work`, which then keeps it.

    Raises StepQuantError where a step needs the influence of errors on the image and guidance
    hides it; nothing is left in `work` then.
    """
    kept = work.load("trajectories")
    if kept is not None:
        return Trajectories.from_tensors(kept)
    calibration = recipe.calibration
    try:
        captured = capture_trajectories(
            pipeline,
            calibration.trajectories,
            calibration.steps,
            seed + 1_000_000,
            calibration.scheduler,
            calibration.batch,
            reporter=reporter,
            conditioning=conditioning,
        )
        if any(step.needs_influence for step in recipe.steps):
            check_unguided(captured)
    except StepQuantError:
        work.remove()  # nothing is kept yet, and the next try may be another job
        raise
    tensors = captured.to_tensors()
    work.save("trajectories", tensors)
    return Trajectories.from_tensors(tensors)  # in the memory layout that a resumed run reads back
