"""The trajectories for the calibration of a recipe."""

from __future__ import annotations

from stepquant.calibration.influence import check_unguided
from stepquant.calibration.trajectories import Trajectories, capture_trajectories
from stepquant.pipelines.sampling import clipping_remark
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder
from stepquant.verbs.quantize_job import Job


def calibration_trajectories(job: Job, work: WorkFolder, reporter: Reporter) -> Trajectories:
    """Return the float model's trajectories: sampled and stored in `work`, or read from it.

    Raises:
        StepQuantError: a step needs the influence of errors on the image, but guidance hides it.
            `work` is empty then.
    """
    remark = clipping_remark(job.sampler.pipeline.scheduler)
    if remark is not None:
        reporter.line(remark)
    kept = work.load("trajectories")
    if kept is not None:
        return Trajectories.from_tensors(kept)
    calibration = job.recipe.calibration
    try:
        captured = capture_trajectories(
            job.source.pipeline,
            calibration.trajectories,
            calibration.steps,
            job.seed + 1_000_000,
            calibration.scheduler,
            calibration.batch,
            reporter=reporter,
            conditioning=job.conditioning,
        )
        if any(step.needs_influence for step in job.recipe.steps):
            check_unguided(captured)
    except StepQuantError:
        work.remove()  # it has no results yet, and the next attempt may be another job
        raise
    tensors = captured.to_tensors()
    work.save("trajectories", tensors)
    return Trajectories.from_tensors(tensors)  # with the memory layout of a resumed run
