from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from stages import Stages
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.sampling import (
    SCHEDULERS,
    check_scales_input,
    clipping_remark,
    needs_own_scheduler,
    resolve_scheduler,
    sample_images,
    set_scheduler,
)
from stepquant.support.errors import StepQuantError

SAMPLERS = ["ddim", "ddpm", "dpm-solver++"]


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return tiny_pipeline()


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_an_image_does_not_depend_on_the_batch(pipeline, scheduler):
    whole, split, single = (
        sample_images(pipeline, 5, 3, seed=4, scheduler=scheduler, batch=batch)
        for batch in (64, 2, 1)
    )
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_image_i_is_that_of_its_own_seed(pipeline, scheduler):
    whole = sample_images(pipeline, 4, 3, seed=10, scheduler=scheduler)
    for shift in ({"seed": 12}, {"seed": 10, "first": 2}):
        part = sample_images(pipeline, 2, 3, scheduler=scheduler, **shift)
        torch.testing.assert_close(part, whole[2:], rtol=0, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=0.1)


def test_images_are_float32_between_zero_and_one(pipeline):
    images = sample_images(pipeline, 3, 2)
    assert images.shape == (3, 1, 16, 16)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.05


def test_the_same_seed_gives_the_same_images_whatever_the_global_generator(pipeline):
    torch.manual_seed(0)
    first = sample_images(pipeline, 3, 3, seed=5, scheduler="ddpm")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = sample_images(pipeline, 3, 3, seed=5, scheduler="ddpm")
    other = sample_images(pipeline, 3, 3, seed=6, scheduler="ddpm")
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scheduler", [*SAMPLERS, None])
def test_the_scheduler_of_the_caller_is_unchanged(tiny_pipeline, scheduler):
    pipeline = tiny_pipeline()
    mine = pipeline.scheduler
    mine.set_timesteps(7)
    config, index = dict(mine.config), dict(pipeline.config)
    sample_images(pipeline, 1, 3, scheduler=scheduler)
    assert pipeline.scheduler is mine
    assert mine.timesteps.tolist() == [852, 710, 568, 426, 284, 142, 0]
    assert mine.num_inference_steps == 7
    assert dict(mine.config) == config
    assert dict(pipeline.config) == index


def test_the_callers_progress_bar_is_unchanged(tiny_pipeline):
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(desc="mine")
    sample_images(pipeline, 1, 1)
    assert pipeline._progress_bar_config == {"desc": "mine"}


def test_none_is_the_schedule_of_the_pipeline(tiny_pipeline):
    pipeline = tiny_pipeline()
    set_scheduler(pipeline, "dpm-solver++")
    own = sample_images(pipeline, 2, 3, scheduler=None)
    assert torch.equal(own, sample_images(pipeline, 2, 3, scheduler="dpm-solver++"))
    assert not torch.allclose(own, sample_images(pipeline, 2, 3, scheduler="ddim"), atol=0.01)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "flow-euler"])
def test_a_named_scheduler_keeps_the_noise_schedule(tiny_pipeline, name):
    pipeline = tiny_pipeline()
    pipeline.scheduler = DDPMScheduler(beta_end=0.013, num_train_timesteps=321)
    set_scheduler(pipeline, name)
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[name]
    assert pipeline.scheduler.config.beta_end == 0.013
    assert pipeline.scheduler.config.num_train_timesteps == 321


def test_an_unknown_scheduler_is_named(pipeline):
    known = "unknown scheduler 'heun': expected one of auto, own, ddim, "
    with pytest.raises(StepQuantError, match=known):
        sample_images(pipeline, 1, 1, scheduler="heun")


@pytest.mark.parametrize("steps", [1001, 5000])
def test_more_steps_than_trained_are_refused(pipeline, steps):
    with pytest.raises(StepQuantError, match=f"is {steps}: expected at most the 1000 that"):
        sample_images(pipeline, 1, steps)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num": 0}, "number of images is 0: expected at least 1"),
        ({"num": -3}, "number of images is -3: expected at least 1"),
        ({"steps": 0}, "number of sampling steps is 0: expected at least 1"),
        ({"batch": 0}, "batch size is 0: expected at least 1"),
    ],
    ids=str,
)
def test_nothing_to_do_is_refused(pipeline, changes, told):
    with pytest.raises(StepQuantError, match=told):
        sample_images(pipeline, **{"num": 1, "steps": 1, **changes})


def test_a_scheduler_that_the_pipeline_does_not_serve_is_refused(pipeline):
    """Euler scales the denoiser's input; a DDPM pipeline does not ask it to, and draws noise."""
    with pytest.raises(
        StepQuantError, match="EulerDiscreteScheduler scales the denoiser's input, which DDPMPipe"
    ):
        sample_images(pipeline, 1, 2, scheduler="euler")
    own = DDPMPipeline(pipeline.unet, EulerDiscreteScheduler())
    with pytest.raises(StepQuantError, match="scales the denoiser's input"):
        sample_images(own, 1, 2, scheduler=None)


def test_a_scheduler_of_the_other_kind_of_model_is_refused(tiny_pipeline):
    pipeline = tiny_pipeline()
    with pytest.raises(StepQuantError, match="'flow-euler' is for a model that predicts flow"):
        set_scheduler(pipeline, "flow-euler")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(StepQuantError, match="'ddim' is for a model that predicts noise"):
        set_scheduler(pipeline, "ddim")
    set_scheduler(pipeline, "flow-euler")
    assert pipeline.scheduler.config.shift == 3.0


def test_auto_is_ddim_and_for_flow_the_pipelines_own(tiny_pipeline):
    pipeline = tiny_pipeline()
    assert resolve_scheduler(pipeline, "auto") == "ddim"
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert resolve_scheduler(pipeline, "auto") is None
    assert resolve_scheduler(pipeline, "flow-euler") == "flow-euler"


def test_a_ddim_scheduler_that_clips_is_remarked_on(pipeline):
    assert "clip_sample" in clipping_remark(DDIMScheduler(clip_sample=True))
    assert clipping_remark(DDIMScheduler(clip_sample=False)) is None
    assert clipping_remark(DDPMScheduler(clip_sample=True)) is None


def test_progress_counts_the_images(pipeline):
    stages = Stages()
    sample_images(pipeline, 5, 1, batch=2, reporter=stages)
    assert stages.totals == {"sampling 5 images": 5}
    assert sorted(set(stages.seen["sampling 5 images"])) == [2, 4, 5]


class Scaling(DDPMPipeline):
    """A pipeline that asks its scheduler to scale the denoiser's input."""

    @torch.no_grad()
    def __call__(self, **call):
        return self.scheduler.scale_model_input(call, 0)


def test_a_scheduler_that_the_pipeline_serves_is_taken(pipeline):
    check_scales_input(Scaling(pipeline.unet, EulerDiscreteScheduler()))
    check_scales_input(DDPMPipeline(pipeline.unet, pipeline.scheduler))


@pytest.mark.parametrize(
    "settings",
    [{"prediction_type": "flow_prediction", "use_flow_sigmas": True}, {"use_flow_sigmas": True}],
)
def test_a_solver_that_was_told_to_match_flow_is_the_pipelines_own(tiny_pipeline, settings):
    """As Sana has it."""
    pipeline = tiny_pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler(flow_shift=3.0, **settings)
    assert needs_own_scheduler(pipeline)
    assert resolve_scheduler(pipeline, "auto") is None
    set_scheduler(pipeline, "dpm-solver++")
    assert pipeline.scheduler.config.flow_shift == 3.0
    with pytest.raises(StepQuantError, match="'ddim' is for a model that predicts noise"):
        set_scheduler(pipeline, "ddim")
    with pytest.raises(StepQuantError, match="'flow-euler' was named instead of DPM"):
        set_scheduler(pipeline, "flow-euler")
    images = sample_images(pipeline, 1, 3)
    assert bool(images.isfinite().all())


def test_a_pipeline_from_a_folder_is_sampled_without_a_warning():
    loaded = open_pipeline("builtin:fashion-ddpm")  # its config also says where it is from
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sample_images(loaded, 1, 1).shape == (1, 1, 32, 32)
