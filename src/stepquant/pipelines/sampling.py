"""Drawing images with a diffusers pipeline: one seed for each image, whatever the batch."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepquant.pipelines.conditioning import Conditioning, takes_prompts
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
FLOW = "FlowMatch"  # beginning of the classes that know nothing else; some others can be told to
AUTO = "auto"  # ddim, or for flow matching the pipeline's own
LARGEST_SEED = 2**48  # multiples of it are drawn from as well


def matches_flow(scheduler: Any) -> bool:
    """Whether `scheduler` walks the straight paths of flow matching instead of removing noise."""
    config = getattr(scheduler, "config", {})
    return (
        type(scheduler).__name__.startswith(FLOW)
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas"))
    )


def needs_own_scheduler(pipeline: DiffusionPipeline) -> bool:
    """Whether DDIM cannot draw with `pipeline`: it matches flow, or has a sampler of its own."""
    return matches_flow(pipeline.scheduler) or getattr(pipeline.scheduler, "owns_sampling", False)


def resolve_scheduler(pipeline: DiffusionPipeline, name: str | None) -> str | None:
    """`name`, or what "auto" stands for: ddim, or None, the pipeline's own, where it needs that."""
    if name != AUTO:
        return name
    return None if needs_own_scheduler(pipeline) else "ddim"


def set_scheduler(pipeline: DiffusionPipeline, name: str | None) -> None:
    """Give the pipeline the scheduler `name` with its own noise schedule; None copies its own."""
    name = resolve_scheduler(pipeline, name)
    if name is None:
        pipeline.scheduler = copy.copy(pipeline.scheduler)  # sampling sets its steps
        return
    if name not in SCHEDULERS:
        raise StepQuantError(f"unknown scheduler '{name}': expected one of {', '.join(SCHEDULERS)}")
    if getattr(pipeline.scheduler, "owns_sampling", False):
        raise StepQuantError(
            f"scheduler '{name}' was asked for where the user's own function draws: expected own, "
            "or a DenoiserPipeline without draw"
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
            f"scheduler '{name}' was asked for in the place of {own}, which was set to match flow: "
            "expected own, the pipeline's; no other class takes its settings over"
        )
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)


def clipping_remark(scheduler: Any) -> str | None:
    """What to know of a DDIM scheduler that clips the predicted image, or None.

    Song et al. (ICLR 2021, arXiv 2010.02502, equation 12) do not clip; diffusers takes the setting
    over from DDPM's. Measured by `benchmarks/sampler_sensitivity.py`.
    """
    if not isinstance(scheduler, diffusers.DDIMScheduler) or not scheduler.config.clip_sample:
        return None
    return (
        "the scheduler has clip_sample on, with which DDIM amplifies small errors such as those of "
        "quantization; the DDIM paper does not clip: try clip_sample false in the pipeline's "
        "scheduler_config.json, or pipeline.scheduler.register_to_config(clip_sample=False)"
    )


def check_count(value: int, what: str) -> int:
    """`value` if it is at least 1; otherwise an error that names `what`."""
    if value < 1:
        raise StepQuantError(f"{what} is {value}: expected at least 1")
    return value


def check_scales_input(pipeline: DiffusionPipeline) -> None:
    """An error where the scheduler scales the denoiser's input and the pipeline does not ask it."""
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
    """`seed` if every seed derived from it fits torch's generators; otherwise an error."""
    if not 0 <= seed <= LARGEST_SEED:
        raise StepQuantError(f"seed is {seed}: expected 0 to {LARGEST_SEED}")
    return seed


def with_own_tokenizers(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A copy of `pipeline` with copies of its tokenizers.

    Tokenizing leaves its padding and truncation in the tokenizer, which a checkpoint would hold
    where it was sampled for, and not where a resumed run had no need to.
    """
    pipeline = copy.copy(pipeline)
    parts = {name: vars(pipeline).get(name) for name in pipeline.config}
    found = {
        name: copy.deepcopy(part)
        for name, part in parts.items()
        # transformers, where it has its class from, may be absent.
        if any(kind.__name__ == "PreTrainedTokenizerBase" for kind in type(part).__mro__)
    }
    pipeline.register_modules(**found)
    return pipeline


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
    """`num` images, float32 `[num, C, H, W]` in [0, 1].

    Image `i` starts from the noise of generator `seed + first + i`, so that two models sampled
    with the same seed can be compared image by image, and the batch size changes nothing. It has
    condition number `first + i` of `conditioning`; `call` goes to the pipeline as well. Without
    `decode` an empty tensor is returned, and latents stay latents where the pipeline can leave
    them: for whoever watches the denoiser.
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
    pipeline.set_progress_bar_config(disable=True)
    images = []
    with reporter.task(f"sampling {num} images", total=num) as task:
        for start in range(0, num, batch):
            count = min(batch, num - start)
            generators = [
                torch.Generator().manual_seed(seed + first + start + i) for i in range(count)
            ]
            result = pipeline(
                generator=generators,
                num_inference_steps=steps,
                output_type="latent" if latent else "np",
                **conditioning.arguments(pipeline, first + start, count),
                **call,
            )
            if decode:
                images.append(torch.from_numpy(result.images).permute(0, 3, 1, 2))
            task.advance(count)
    if not decode:
        return torch.empty(0)
    return torch.cat(images).contiguous().to(torch.float32)
