from __future__ import annotations

import pytest
import torch

from stepquant.calibration.trajectories import Trajectories
from stepquant.errors import StepQuantError
from stepquant.methods import BlockDistillation, BlockReconstruction, ProgressiveAlignment
from stepquant.methods.block_training import training_inputs
from stepquant.methods.coherence import (
    check_together,
    coherent_batches,
    held_out_groups,
    shared_error,
    whole_trajectories,
)
from stepquant.recipe import load_recipe, parse_step
from stepquant.scheme import Scheme

SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "sample_size": 8,
}


def trajectories(images, steps, guided=False):
    """Step by step as a sampler calls, `sample` saying image, step and kind of call."""
    timesteps = torch.arange(steps).flip(0) * 10
    kinds = 2 if guided else 1
    entries = [
        (image + 100 * kind, int(step), image)
        for step in timesteps
        for kind in range(kinds)
        for image in range(images)
    ]
    sample = torch.tensor([[own * 1000.0 + step] for own, step, _ in entries])
    return Trajectories(
        sample,
        torch.tensor([step for _, step, _ in entries]),
        torch.tensor([image for _, _, image in entries]),
        timesteps,
    )


@pytest.mark.parametrize("guided", [False, True])
def test_whole_trajectories_lie_one_behind_the_other(guided):
    data = trajectories(5, 4, guided)
    found = whole_trajectories(data, 16, "x")
    assert len(found) == 16
    table = found.sample.view(4, 4)
    owners, steps = table.div(1000, rounding_mode="floor"), table % 1000
    assert (owners == owners[:, :1]).all() and owners[:, 0].unique().numel() == 4
    assert steps.tolist() == [[30, 20, 10, 0]] * 4
    assert torch.equal(found.timestep.view(4, 4).float(), steps)
    assert (found.trajectory.view(4, 4) == owners % 100).all()


def test_there_are_always_two_trajectories():
    assert len(whole_trajectories(trajectories(5, 8), 1, "x")) == 16


def test_too_few_trajectories_are_named():
    with pytest.raises(StepQuantError, match="step 'x' has 1 calibration trajectory: expected"):
        whole_trajectories(trajectories(1, 8), 64, "x")


def test_a_batch_has_whole_groups_of_distinct_steps():
    generator = torch.Generator().manual_seed(0)
    batches = coherent_batches(6, 10, 4, 12, 50, generator)
    seen = set()
    for batch in batches:
        groups = batch.view(3, 4)
        assert (groups // 10 == groups[:, :1] // 10).all()
        assert all(len(set(group.tolist())) == 4 for group in groups)
        seen |= set(batch.tolist())
    assert seen == set(range(60))  # all are drawn in the end, none from beyond the six


def test_held_out_groups_take_each_step_once_at_most():
    found = held_out_groups(torch.tensor([2, 5]), 10, 4, torch.Generator().manual_seed(0))
    assert len(found) == 16 and found.unique().numel() == 16
    assert (found.view(4, 4) // 10).tolist() == [[2] * 4, [2] * 4, [5] * 4, [5] * 4]


def test_what_cancels_out_counts_less_than_what_adds_up():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(500, 1, 3, generator=generator, dtype=torch.float64)
    own = torch.randn(500, 8, 3, generator=generator, dtype=torch.float64)
    power = shared_error((2 * shared + own).flatten(0, 1), 8).square().mean()
    assert float(power) == pytest.approx(4 + 1 / 8, rel=0.1)
    by_hand = (2 * shared + own).mean(dim=1)
    assert torch.allclose(shared_error((2 * shared + own).flatten(0, 1), 8), by_hand)


@pytest.mark.parametrize("name", ["block_reconstruction", "block_distillation"])
def test_more_steps_together_than_a_batch_has_are_refused(name):
    step = parse_step({name: {"steps_together": 33}})
    with pytest.raises(StepQuantError, match=f"step '{name}' has steps_together 33 and .* of 32"):
        step.check(Scheme())
    check_together(name, 32, 32)


def test_sequential_batches_have_one_step_only():
    step = BlockDistillation(steps_together=8, step_order="sequential")
    with pytest.raises(StepQuantError, match="step_order sequential and steps_together 8"):
        step.check(Scheme())


@pytest.mark.parametrize(
    "step",
    [
        BlockReconstruction(iterations=8, batch=8, samples=32, steps_together=2),
        BlockDistillation(iterations=8, batch=8, samples=32, steps_together=2),
        ProgressiveAlignment(
            iterations=8, later_iterations=4, rounds=1, batch=8, samples=32, steps_together=2
        ),
    ],
    ids=lambda step: step.name,
)
def test_training_lowers_the_shared_error(tiny_session, step, one_thread):
    def run():
        session = tiny_session(weights=4, activations=4, num=8, steps=4, **SMALL)
        step.apply(session)
        return session

    session = run()
    summary = session.summary[step.name]
    records = summary[0] if isinstance(summary[0], list) else summary
    assert len(records) == 9
    assert all(record["loss_after"] <= record["loss_before"] for record in records)
    assert sum(r["loss_after"] for r in records) < sum(r["loss_before"] for r in records)
    again = run().model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in session.model.state_dict().items())


def test_a_sampler_of_fewer_steps_has_them_all_together(tiny_session, one_thread):
    def train(together):
        session = tiny_session(weights=4, activations=4, num=8, steps=3, **SMALL)
        options = {"iterations": 4, "batch": 8, "samples": 24}
        BlockReconstruction(steps_together=together, **options).apply(session)
        return session.model.state_dict()

    all_of_them = train(3)
    for name, value in train(8).items():
        assert torch.equal(value, all_of_them[name]), name


def test_inputs_of_a_step_are_whole_trajectories_if_it_says_so(tiny_session):
    session = tiny_session(weights=4, activations=4, num=8, steps=4, **SMALL)
    apart = training_inputs(session, "x", 16)
    together = training_inputs(session, "x", 16, 2)
    assert len(apart) == len(together) == 16
    assert together.trajectory.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_the_recipe_trains_on_shared_errors():
    first, step, last = load_recipe("stepquant").steps
    assert first.name == "input_error_bypass"
    assert step.steps_together == last.steps_together == 8
