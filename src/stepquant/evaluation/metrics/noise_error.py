"""Error of the noise prediction at each sampling step, on the float model's trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from stepquant.calibration.trajectories import capture_trajectories, predict
from stepquant.evaluation.metric import Comparison, register_metric
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.resolved import denoiser_of
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StepError(TypedDict):
    """One row of `noise_prediction_error`: a timestep and its relative mean squared error."""

    timestep: int | float
    relative_mse: float


def noise_prediction_error(
    float_outputs: Sequence[Tensor] | Tensor,
    quantized_outputs: Sequence[Tensor] | Tensor,
    timesteps: Sequence[float] | Tensor,
) -> list[StepError]:
    """Relative mean squared error of the denoiser's output at each sampling step.

    The error is divided by the mean square of the float output. Call both models with the same
    inputs, those of the float trajectory; otherwise the errors of earlier steps count again.

    Args:
        float_outputs: T outputs of the float model, each `[N, ...]`, or one tensor `[T, N, ...]`.
        quantized_outputs: the same, of the quantized model.
        timesteps: the T timesteps of the outputs.

    Returns:
        T rows {"timestep": number, "relative_mse": float}, in the order of `timesteps`. 0 means
        equal outputs; an output of zeros has an error of 1.

    Raises:
        StepQuantError: lengths or shapes differ, values are not finite, or a float output is zero
            everywhere; the message names the timestep.
    """
    # Flow matching has fractional timesteps.
    steps = [int(step) if float(step).is_integer() else float(step) for step in timesteps]
    if not len(float_outputs) == len(quantized_outputs) == len(steps) > 0:
        raise StepQuantError(
            f"there are {len(float_outputs)} float outputs, {len(quantized_outputs)} quantized "
            f"outputs and {len(steps)} timesteps: expected one of each per step, one step or more"
        )
    rows: list[StepError] = []
    for step, wanted, found in zip(steps, float_outputs, quantized_outputs, strict=True):
        if wanted.shape != found.shape or wanted.numel() == 0:
            raise StepQuantError(
                f"the quantized output at timestep {step} has shape {list(found.shape)}: expected "
                f"that of the float output, {list(wanted.shape)}, and not empty"
            )
        want = wanted.detach().cpu().double()
        error = float((found.detach().cpu().double() - want).square().mean())
        power = float(want.square().mean())
        relative = error / power if power > 0 else float("nan")
        if not 0 <= relative < float("inf"):
            raise StepQuantError(
                f"the outputs at timestep {step} have a mean squared error of {error} and a float "
                f"mean square of {power}: expected finite values and a float output above zero"
            )
        rows.append({"timestep": step, "relative_mse": relative})
    return rows


@torch.no_grad()
def noise_error(
    candidate: DiffusionPipeline,
    reference: DiffusionPipeline,
    steps: int,
    scheduler: str | None,
    seed: int,
    num: int = 16,
    reporter: Reporter | None = None,
    conditioning: Conditioning | None = None,
) -> list[StepError]:
    """Relative squared error of the noise prediction at each step, on `num` float trajectories.

    Samples the trajectories with `reference`, with seeds far from those of the images, and calls
    both denoisers with their inputs.

    Returns:
        One row per sampling step, see `noise_prediction_error`.
    """
    reporter = reporter or Reporter(quiet=True)
    trajectories = capture_trajectories(
        reference,
        num,
        steps,
        seed + 2_000_000,
        scheduler,
        reporter=reporter,
        conditioning=conditioning,
    )
    ours, theirs = denoiser_of(candidate), denoiser_of(reference)
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    with reporter.task("comparing noise predictions", total=len(trajectories.timesteps)) as task:
        for row in range(len(trajectories.timesteps)):
            inputs = trajectories.step(row)
            outputs[0].append(predict(theirs, inputs))
            outputs[1].append(predict(ours, inputs))
            task.advance()
    return noise_prediction_error(*outputs, trajectories.timesteps)


def mean_and_worst(errors: list[StepError]) -> dict[str, float]:
    """Mean over all steps and the largest error, under labels for tables."""
    worst = max(errors, key=lambda row: row["relative_mse"])
    mean = sum(row["relative_mse"] for row in errors) / len(errors)
    return {
        "noise_error, mean over steps": mean,
        f"noise_error, worst step ({worst['timestep']})": worst["relative_mse"],
    }


@register_metric("noise_error", key="noise_error", better="lower", summary=mean_and_worst)
def noise(images: Tensor, float_images: Tensor, comparison: Comparison) -> dict[str, Any]:
    """The metric `noise_error` of the two models of the comparison."""
    return {
        "noise_error": noise_error(
            comparison.candidate,
            comparison.reference,
            comparison.steps,
            comparison.scheduler,
            comparison.seed,
            reporter=comparison.reporter,
            conditioning=comparison.conditioning,
        )
    }
