"""Pipelines: callbacks, samplers, saving, other pipelines of the same components."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)

from behaviour import behaviour, need
from behaviour_subjects import FLOAT, Subject, distance, float_pipeline, own_error

GROUP = "Pipelines"
FLOWS = ("sd3", "flux")


@behaviour(GROUP)
def pipeline_saved_and_loaded(s: Subject) -> None:
    """`save_pretrained` and `from_pretrained` of the pipeline: the same images."""
    pipeline = s.pipeline()
    wanted = s.draw(pipeline, 2)
    pipeline.save_pretrained(s.folder)
    loaded = DiffusionPipeline.from_pretrained(s.folder, **s.named_dtype)
    assert type(loaded) is type(pipeline)
    s.same(s.draw(loaded, 2), wanted)


@behaviour(GROUP)
def callback_at_each_step(s: Subject) -> None:
    """`callback_on_step_end` is called at each step, and what it changes has effect."""
    pipeline = s.pipeline()
    parameters = inspect.signature(type(pipeline).__call__).parameters
    need("callback_on_step_end" in parameters, "the pipeline has none")
    seen: list[int] = []

    def halve(pipeline: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": 0.5 * given["latents"]}

    plain = s.draw(pipeline)
    found = s.draw(pipeline, callback_on_step_end=halve)
    assert seen == [0, 1, 2], f"called at the steps {seen}"
    assert not torch.equal(found, plain), "the callback changes nothing"
    again = s.pipeline(s.float_model)
    s.as_float(found, s.draw(again, callback_on_step_end=halve), 0.1)


def swapped(s: Subject, kind: Any, **changes: Any) -> None:
    """Images of another sampler are as near to the float model's as those of the pipeline's own."""
    pipelines = [s.pipeline(), s.pipeline(s.float_model)]
    own = [s.draw(each) for each in pipelines]
    for each in pipelines:
        each.scheduler = kind.from_config(each.scheduler.config, **changes)
    found, wanted = (s.draw(each) for each in pipelines)
    assert bool(torch.isfinite(found).all()), "NaN or infinity"
    error = 0.0 if s.kind == FLOAT else own_error(s.kind, s.name)
    s.close(found, wanted, 2 * max(error, distance(*own)) + 0.05)


@behaviour(GROUP)
def ddim(s: Subject) -> None:
    """DDIM in place of the pipeline's sampler, with trailing timesteps."""
    need(s.name not in FLOWS, "flow matching")
    swapped(s, DDIMScheduler, timestep_spacing="trailing")


@behaviour(GROUP)
def dpm(s: Subject) -> None:
    """DPM-Solver++ in place of the pipeline's sampler."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    need(s.name not in FLOWS or s.name == "sd3", "tried with Stable Diffusion 3")
    swapped(s, DPMSolverMultistepScheduler, **(flow if s.name in FLOWS else {}))


@behaviour(GROUP)
def euler(s: Subject) -> None:
    """Euler in place of the pipeline's sampler."""
    need(s.name not in FLOWS, "flow matching has its own Euler sampler")
    need(s.name not in ("ddpm",), "the pipeline does not scale its samples")
    swapped(s, EulerDiscreteScheduler)


@behaviour(GROUP)
def heun(s: Subject) -> None:
    """Heun in place of the pipeline's sampler, that of flow matching where there is one."""
    need(s.name not in ("ddpm",), "the pipeline does not scale its samples")
    need(s.name != "flux", "the sampler takes no dynamic shift")
    swapped(s, FlowMatchHeunDiscreteScheduler if s.name in FLOWS else HeunDiscreteScheduler)


@behaviour(GROUP)
def pndm(s: Subject) -> None:
    """PNDM in place of the pipeline's sampler."""
    need(s.name not in FLOWS, "flow matching")
    need(s.name != "ddpm", "the pipeline hands the sampler a generator, which it does not take")
    swapped(s, PNDMScheduler, skip_prk_steps=True)


@behaviour(GROUP)
def unipc(s: Subject) -> None:
    """UniPC in place of the pipeline's sampler."""
    need(s.name not in FLOWS or s.name == "sd3", "tried with Stable Diffusion 3")
    need(s.name != "ddpm", "the pipeline hands the sampler a generator, which it does not take")
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    swapped(s, UniPCMultistepScheduler, **(flow if s.name in FLOWS else {}))


@behaviour(GROUP)
def other_number_of_steps(s: Subject) -> None:
    """More steps than calibrated: as near to the float model's images."""
    found, wanted = (s.draw(s.pipeline(model), 5) for model in (s.model, s.float_model))
    s.as_float(found, wanted, 0.1)


@behaviour(GROUP)
def from_pipe(s: Subject) -> None:
    """`from_pipe` makes another pipeline of the same components."""
    need(s.name == "sd", "tried with Stable Diffusion")
    pipeline = s.pipeline()
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    drawn = other(
        prompt="a cat", image=image, strength=0.5, num_inference_steps=4, output_type="np"
    ).images
    assert bool(torch.isfinite(torch.as_tensor(drawn)).all())


@behaviour(GROUP)
def pipeline_to_its_own_dtype(s: Subject) -> None:
    """`pipeline.to(torch.float32)` of a float32 pipeline changes nothing."""
    pipeline = s.pipeline()
    wanted = s.draw(pipeline, 2)
    s.same(s.draw(pipeline.to(torch.float32), 2), wanted)


@behaviour(GROUP)
def components_listed(s: Subject) -> None:
    """`pipeline.components` makes the same pipeline again."""
    pipeline = s.pipeline()
    kind = type(float_pipeline(s.name))
    parts = dict(pipeline.components)
    more = {"requires_safety_checker": False} if s.name == "sd" else {}
    again = kind(**parts, **more)
    again.set_progress_bar_config(disable=True)
    s.same(s.draw(again, 2), s.draw(pipeline, 2))
