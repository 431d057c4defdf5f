from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler, ScoreSdeVePipeline
from torch import nn

from stepquant.pipelines.resolved import ResolvedPipeline, denoiser_of
from stepquant.support.errors import StepQuantError


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return tiny_pipeline()


def test_the_denoiser_is_found_by_its_name(pipeline):
    found = ResolvedPipeline.of(pipeline)
    assert (found.pipeline, found.name, found.denoiser) == (pipeline, "unet", pipeline.unet)
    assert found.adapter is None and found.kind == "DDPMPipeline"
    assert denoiser_of(pipeline) is pipeline.unet


class WithoutDenoiser(ScoreSdeVePipeline):
    def __init__(self, network: nn.Module) -> None:
        super(ScoreSdeVePipeline, self).__init__()
        self.register_modules(network=network)


def test_a_pipeline_without_a_denoiser_is_told(tiny_unet):
    without = WithoutDenoiser(tiny_unet())
    assert ResolvedPipeline.find(without) is None
    with pytest.raises(
        StepQuantError, match=r"WithoutDenoiser has the components \['network'\]: expected a denoi"
    ):
        ResolvedPipeline.of(without)


def test_another_denoiser_comes_in_a_copy_that_is_saved_as_before(pipeline):
    class Other(nn.Module):
        pass

    other = Other()
    found = ResolvedPipeline.of(pipeline).with_denoiser(other)
    assert found.pipeline.unet is found.denoiser is other
    assert found.pipeline.scheduler is pipeline.scheduler
    assert found.pipeline.config == pipeline.config
    assert pipeline.unet is not other


def test_another_scheduler_comes_in_a_copy(pipeline):
    source = ResolvedPipeline.of(pipeline)
    own = pipeline.scheduler
    assert type(source.with_scheduler("euler").pipeline.scheduler) is EulerDiscreteScheduler
    copied = source.with_scheduler(None).pipeline.scheduler
    assert type(copied) is type(own) and copied is not own
    assert pipeline.scheduler is own


def test_a_scheduler_is_set_to_the_steps_that_are_asked_for(pipeline):
    before = pipeline.scheduler.timesteps
    assert len(ResolvedPipeline.of(pipeline).scheduler(3).timesteps) == 3
    assert torch.equal(pipeline.scheduler.timesteps, before)
