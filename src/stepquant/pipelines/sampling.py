"""Sampling with a diffusers pipeline; each image has its own seed, whatever the batch size."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepquant.pipelines.conditioning import Conditioning, takes_prompts
from stepquant.pipelines.step_bar import report_steps
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.progress_task import Task

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
FLOW = "FlowMatch"  # prefix of classes for flow matching only; some others have a setting for it
AUTO = "auto"  # "ddim", or the pipeline's own scheduler if DDIM cannot be used
OWN = "own"  # the pipeline's own scheduler, as None
LARGEST_SEED = 2**48  # stepquant also seeds generators with multiples of the seed


def matches_flow(scheduler: Any) -> bool:
    """Whether `scheduler` is for flow matching instead of noise prediction."""
    config = getattr(scheduler, "config", {})
    return (
        type(scheduler).__name__.startswith(FLOW)
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def needs_own_scheduler(pipeline: DiffusionPipeline) -> bool:
    """Whether DDIM cannot be used: `pipeline` is for flow matching, or has its own sampler."""
    return matches_flow(pipeline.scheduler) or getattr(pipeline.scheduler, "owns_sampling", False)


def resolve_scheduler(pipeline: DiffusionPipeline, name: str | None) -> str | None:
    """Return `name`, with "auto" resolved to "ddim" or None, and "own" to None.

    None is the pipeline's own scheduler. "auto" is resolved to None if DDIM cannot be used.
    """
    if name == OWN:
        return None
    if name != AUTO:
        return name
    return None if needs_own_scheduler(pipeline) else "ddim"


def set_scheduler(pipeline: DiffusionPipeline, name: str | None) -> None:
    """Give the pipeline the scheduler `name`, with the settings of its own scheduler.

    None gives it a copy of its own scheduler.

    Raises:
        StepQuantError: the name is unknown, the user's own function samples, or the scheduler does
            not fit the model's kind of prediction.
    """
    name = resolve_scheduler(pipeline, name)
    if name is None:
        pipeline.scheduler = copy.copy(pipeline.scheduler)  # because sampling sets its steps
        return
    if name not in SCHEDULERS:
        raise StepQuantError(
            f"unknown scheduler '{name}': expected one of {AUTO}, {OWN}, {', '.join(SCHEDULERS)}"
        )
    if getattr(pipeline.scheduler, "owns_sampling", False):
        raise StepQuantError(
            f"scheduler '{name}' was named for a DenoiserPipeline that draws with its own "
            "function: expected own, or a DenoiserPipeline without draw"
        )
    kind = getattr(diffusers, SCHEDULERS[name])
    flow, own = matches_flow(pipeline.scheduler), type(pipeline.scheduler).__name__
    flow_only = kind.__name__.startswith(FLOW)
    if kind.__name__ != own and flow_only != flow:
        raise StepQuantError(
            f"scheduler '{name}' is for a model that predicts {'flow' if flow_only else 'noise'}, "
            f"and {own} for one that predicts {'flow' if flow else 'noise'}: expected one of its "
            "kind; try own, the pipeline's"
        )
    if kind.__name__ != own and flow and not own.startswith(FLOW):
        raise StepQuantError(
            f"scheduler '{name}' was named instead of {own}, which is set up for flow matching: "
            "expected own, the pipeline's scheduler, because no other class takes over its "
            "settings"
        )
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)


def clipping_remark(scheduler: Any) -> str | None:
    """Return a warning about a DDIM scheduler that clips the predicted image, or None.

    Song et al. (ICLR 2021, arXiv 2010.02502, equation 12) do not clip; diffusers takes the setting
    over from DDPM's scheduler. `benchmarks/sampler_sensitivity.py` measures the effect.
    """
    if not isinstance(scheduler, diffusers.DDIMScheduler) or not scheduler.config.clip_sample:
        return None
    return (
        "the scheduler has clip_sample on, with which DDIM amplifies small errors such as those of "
        "quantization; the DDIM paper does not clip: try clip_sample false in the pipeline's "
        "scheduler_config.json, or pipeline.scheduler.register_to_config(clip_sample=False)"
    )


def check_count(value: int, what: str) -> int:
    """Return `value`.

    Raises:
        StepQuantError: `value` is below 1. The message names it by `what`.
    """
    if value < 1:
        raise StepQuantError(f"{what} is {value}: expected at least 1")
    return value


def check_scales_input(pipeline: DiffusionPipeline) -> None:
    """Check that the pipeline scales the denoiser's input if its scheduler requires that.

    Raises:
        StepQuantError: the scheduler scales the input, but the pipeline does not call it for that.
    """
    call = inspect.unwrap(type(pipeline).__call__)
    if (
        hasattr(pipeline.scheduler, "is_scale_input_called")
        and not getattr(pipeline, "scales_input", False)
        and "scale_model_input" not in call.__code__.co_names
    ):
        raise StepQuantError(
            f"{type(pipeline.scheduler).__name__} scales the denoiser's input, which "
            f"{type(pipeline).__name__} does not do for it: expected another scheduler "
            "for this pipeline, such as ddim"
        )


def check_seed(seed: int) -> int:
    """Return `seed`.

    Raises:
        StepQuantError: `seed` is negative or above `LARGEST_SEED`, so that a seed derived from it
            may not fit torch's generators.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise StepQuantError(f"seed is {seed}: expected 0 to {LARGEST_SEED}")
    return seed


def with_own_tokenizers(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Return a copy of `pipeline` with copies of its tokenizers.

    Tokenizing stores padding and truncation in the tokenizer, and thus in a saved checkpoint. A
    resumed run that need not sample again would then write a different checkpoint.
    """
    pipeline = copy.copy(pipeline)
    parts = {name: vars(pipeline).get(name) for name in pipeline.config}
    found = {
        name: copy.deepcopy(part)
        for name, part in parts.items()
        # By name: the package transformers, which defines the class, may be absent.
        if any(kind.__name__ == "PreTrainedTokenizerBase" for kind in type(part).__mro__)
    }
    pipeline.register_modules(**found)
    return pipeline


def report_share(task: Task, count: int, share: float) -> None:
    """Report that `share` of the steps of `count` images are done."""
    task.within(count * share)


@torch.no_grad()
def sample_images(
    pipeline: DiffusionPipeline,
    num: int,
    steps: int,
    seed: int = 0,
    scheduler: str | None = AUTO,
    batch: int = 64,
    reporter: Reporter | None = None,
    first: int = 0,
    *,
    conditioning: Conditioning | None = None,
    decode: bool = True,
    **call: Any,
) -> Tensor:
    """Sample `num` images and return them as float32 `[num, C, H, W]` in [0, 1].

    Videos are returned as `[num, F, C, H, W]`, with `F` frames each.

    Image `i` starts from the noise of a generator with seed `seed + first + i`. Two models sampled
    with the same seed can therefore be compared image by image, and the batch size has no effect on
    the noise. Image `i` has condition number `first + i` of `conditioning`.

    Args:
        pipeline: pipeline to sample; it is not changed.
        num: number of images.
        steps: number of sampling steps.
        seed: seed of the first image's noise, if `first` is 0.
        scheduler: a name from `SCHEDULERS`, "auto", or "own" or None for the pipeline's own.
        batch: largest number of images sampled at once.
        reporter: shows progress; None shows none.
        first: number of the first image.
        conditioning: prompts or labels, and guidance.
        decode: False returns an empty tensor and, if possible, leaves out the decoding of latents;
            for callers that only observe the denoiser.
        **call: further arguments of the pipeline.

    Raises:
        StepQuantError: a count or the seed is out of range, there are more steps than the model was
            trained with, the scheduler does not fit, or the pipeline does not take the conditions.
    """
    check_count(num, "number of images")
    check_count(steps, "number of sampling steps")
    check_count(batch, "batch size")
    check_seed(seed)
    reporter = reporter or Reporter(quiet=True)
    pipeline = with_own_tokenizers(pipeline)
    set_scheduler(pipeline, scheduler)
    trained = pipeline.scheduler.config.get("num_train_timesteps", steps)
    if steps > trained:
        raise StepQuantError(
            f"number of sampling steps is {steps}: expected at most the {trained} that the model "
            "was trained with"
        )
    check_scales_input(pipeline)
    conditioning = conditioning or Conditioning()
    conditioning.check(pipeline)
    latent = not decode and takes_prompts(pipeline) and getattr(pipeline, "vae", None) is not None
    images = []
    with reporter.task(f"sampling {num} images", total=num) as task:
        for start in range(0, num, batch):
            count = min(batch, num - start)
            generators = [
                torch.Generator().manual_seed(seed + first + start + i) for i in range(count)
            ]
            report_steps(pipeline, partial(report_share, task, count))
            result = pipeline(
                generator=generators,
                num_inference_steps=steps,
                output_type="latent" if latent else "np",
                **conditioning.arguments(pipeline, first + start, count),
                **call,
            )
            if decode:
                images.append(drawn_in(result))
            task.advance(count)
    if not decode:
        return torch.empty(0)
    return torch.cat(images).contiguous().to(torch.float32)


def drawn_in(result: Any) -> Tensor:
    """Return the images `[N, C, H, W]` or the videos `[N, F, C, H, W]` in a pipeline's result.

    Raises:
        StepQuantError: the result holds neither.
    """
    for name in ("images", "frames"):
        found = getattr(result, name, None)
        if isinstance(found, np.ndarray):
            return torch.from_numpy(found).movedim(-1, -3)
    raise StepQuantError(
        f"the pipeline returned a {type(result).__name__}: expected one with arrays as 'images' or "
        "'frames'; call the pipeline itself for other results"
    )
