from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from stepquant.calibration.trajectories import Trajectories, capture_trajectories
from stepquant.support.errors import StepQuantError

SEED = 11


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline):
    return tiny_pipeline()


@pytest.fixture(scope="module")
def captured(pipeline):
    """Five trajectories of four steps, in batches of 2, 2 and 1."""
    return capture_trajectories(pipeline, 5, 4, SEED, "ddim", batch=2)


def numbered(steps: int, per_step: int) -> Trajectories:
    """Inputs that can be told apart: input `i` holds the value `i`."""
    count = steps * per_step
    timesteps = torch.arange(steps).flip(0) * 10
    return Trajectories(
        torch.arange(count).float().view(-1, 1, 1, 1),
        timesteps.repeat_interleave(per_step),
        torch.arange(per_step).repeat(steps),
        timesteps,
    )


def test_every_input_of_the_denoiser_is_kept(captured):
    assert captured.sample.shape == (20, 1, 16, 16)
    assert captured.sample.dtype == torch.float32
    assert captured.timestep.shape == captured.trajectory.shape == (20,)
    assert len(captured) == 20


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [("ddim", [750, 500, 250, 0]), ("ddpm", [750, 500, 250, 0]), ("dpm-solver++", None)],
)
def test_timesteps_are_distinct_and_in_sampling_order(pipeline, scheduler, steps):
    timesteps = capture_trajectories(pipeline, 3, 4, SEED, scheduler, batch=2).timesteps
    assert timesteps.shape == (4,)
    assert torch.equal(timesteps, timesteps.sort(descending=True).values)
    assert steps is None or timesteps.tolist() == steps


def test_the_step_grid_has_a_row_for_each_timestep_in_that_order(captured):
    grid = captured.grid()
    assert len(grid) == 4
    assert grid.rows(captured.timesteps).tolist() == [0, 1, 2, 3]


def test_each_trajectory_begins_with_its_own_noise_whatever_the_batches(captured):
    first = captured.timestep == captured.timesteps[0]
    assert captured.trajectory[first].tolist() == [0, 1, 2, 3, 4]
    for index, sample in zip(captured.trajectory[first], captured.sample[first], strict=True):
        generator = torch.Generator().manual_seed(SEED + int(index))
        assert torch.equal(sample, torch.randn(1, 16, 16, generator=generator))


@pytest.mark.parametrize("index", [0, 3, 4])
def test_the_trajectory_index_says_from_which_image_an_input_is(pipeline, captured, index):
    alone = capture_trajectories(pipeline, 1, 4, SEED + index, "ddim")
    mine = captured.trajectory == index
    assert captured.timestep[mine].tolist() == alone.timestep.tolist() == [750, 500, 250, 0]
    torch.testing.assert_close(captured.sample[mine], alone.sample, rtol=1e-4, atol=1e-4)


def test_inputs_at_a_step_are_those_of_that_step_and_at_most_the_limit(captured):
    for row, timestep in enumerate(captured.timesteps):
        expected = captured.sample[captured.timestep == timestep]
        assert len(expected) == 5
        assert torch.equal(captured.step(row).sample, expected)
        assert torch.equal(captured.step(row, 2).sample, expected[:2])


def test_capturing_leaves_no_hook_behind(pipeline):
    capture_trajectories(pipeline, 1, 2, SEED, "ddim")
    with pytest.raises(StepQuantError):
        capture_trajectories(pipeline, 1, 2000, SEED, "ddim")
    assert not pipeline.unet._forward_pre_hooks


class OneTimestepForEachSample(DDPMPipeline):
    """Hands the denoiser a tensor of timesteps, as many pipelines do; `by_name` or by place."""

    by_name = False

    @torch.no_grad()
    def __call__(self, batch_size, generator, num_inference_steps, output_type):
        x = torch.cat([torch.randn(1, 1, 16, 16, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            each = t.expand(batch_size)
            noise = self.unet(x, timestep=each) if self.by_name else self.unet(x, each)
            x = self.scheduler.step(noise.sample, t, x).prev_sample
        return ImagePipelineOutput(images=(x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("by_name", [False, True], ids=["by place", "by name"])
def test_timesteps_may_come_one_for_each_sample(pipeline, captured, by_name):
    other = OneTimestepForEachSample(pipeline.unet, pipeline.scheduler)
    other.by_name = by_name
    found = capture_trajectories(other, 5, 4, SEED, "ddim", batch=2)
    assert torch.equal(found.timestep, captured.timestep)
    assert torch.equal(found.trajectory, captured.trajectory)
    torch.testing.assert_close(found.sample, captured.sample, rtol=1e-4, atol=1e-4)


def test_no_trajectory_at_all_is_refused(pipeline):
    with pytest.raises(StepQuantError, match="number of calibration trajectories is 0"):
        capture_trajectories(pipeline, 0, 4, SEED, "ddim")


@pytest.mark.parametrize("count", [1, 5, 7, 10, 19])
def test_a_subset_is_spread_evenly_over_the_steps(count):
    chosen = numbered(steps=5, per_step=4).subset(count, seed=0)
    assert len(chosen) == count
    assert len(chosen.sample.unique()) == count
    counts = [int((chosen.timestep == step).sum()) for step in chosen.timesteps]
    assert max(counts) - min(counts) <= 1


def test_a_subset_keeps_inputs_timesteps_and_trajectories_together():
    whole = numbered(steps=5, per_step=4)
    chosen = whole.subset(9, seed=3)
    index = chosen.sample.flatten().long()
    assert torch.equal(chosen.timestep, whole.timestep[index])
    assert torch.equal(chosen.trajectory, whole.trajectory[index])
    assert torch.equal(chosen.timesteps, whole.timesteps)


def test_a_subset_depends_on_its_seed_alone():
    whole = numbered(steps=5, per_step=8)
    first, again, other = (whole.subset(20, seed).sample for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_subset_of_more_than_there_is_holds_everything_shuffled():
    whole = numbered(steps=5, per_step=4)
    chosen = whole.subset(1000, seed=0).sample.flatten()
    assert torch.equal(chosen.sort().values, whole.sample.flatten())
    assert not torch.equal(chosen, whole.sample.flatten())


def test_trajectories_survive_being_stored(captured):
    again = Trajectories(**captured.to_tensors())
    for name in ("sample", "timestep", "trajectory", "timesteps"):
        assert torch.equal(getattr(again, name), getattr(captured, name))
