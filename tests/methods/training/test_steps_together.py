from __future__ import annotations

import pytest
import torch

from architectures import session as session_of
from stepquant.calibration.conditions import Conditions
from stepquant.calibration.trajectories import Trajectories
from stepquant.methods import BlockDistillation, BlockReconstruction, ProgressiveAlignment
from stepquant.methods.recipe import load_recipe, parse_step
from stepquant.methods.training.block_training import training_inputs
from stepquant.methods.training.steps_together import (
    check_together,
    coherent_batches,
    coherent_inputs,
    held_out_groups,
    of_all_kinds,
    shared_error,
    steps_of_each,
)
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError

SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "sample_size": 8,
}


def trajectories(images, steps, guided=False, labels=1):
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
        Conditions(
            {"class_labels": torch.arange(labels)},
            {"class_labels": torch.tensor([image % labels for _, _, image in entries])},
        ),
    )


@pytest.mark.parametrize("guided", [False, True])
def test_whole_trajectories_lie_one_behind_the_other(guided):
    data = trajectories(5, 4, guided)
    found = coherent_inputs(data, 16, 2, "x", 0)
    assert len(found) == 16
    table = found.sample.view(4, 4)
    owners, steps = table.div(1000, rounding_mode="floor"), table % 1000
    assert (owners == owners[:, :1]).all() and owners[:, 0].unique().numel() == 4
    assert steps.tolist() == [[30, 20, 10, 0]] * 4
    assert torch.equal(found.timestep.view(4, 4).float(), steps)
    assert (found.trajectory.view(4, 4) == owners % 100).all()


@pytest.mark.parametrize("guided", [False, True])
def test_where_labels_differ_every_trajectory_gives_some_steps(guided):
    data = trajectories(12, 10, guided, labels=3)
    rows = 24 if guided else 12
    assert steps_of_each(data, rows * 4, 2) == 4
    found = coherent_inputs(data, rows * 4, 2, "x", 0)
    table = found.sample.view(rows, 4)
    owners, steps = table.div(1000, rounding_mode="floor"), (table % 1000 / 10).long()
    assert (owners == owners[:, :1]).all() and owners[:, 0].unique().numel() == rows
    # One of each part of the sampler's ten steps, from the noise down to the image.
    ends = torch.tensor([0, 2, 5, 7, 10])
    rank = 9 - steps
    assert ((rank >= ends[:-1]) & (rank < ends[1:])).all()
    assert set(steps.flatten().tolist()) == set(range(10))
    if guided:  # an image's two side by side, at the same steps
        assert torch.equal(owners[1::2], owners[::2] + 100)
        assert torch.equal(steps[1::2], steps[::2])


def test_no_fewer_steps_than_are_taken_together():
    data = trajectories(12, 10, labels=3)
    assert steps_of_each(data, 48, 8) == 8
    found = coherent_inputs(data, 48, 8, "x", 0)
    assert len(found) == 48 and found.trajectory.unique().tolist() == list(range(6))
    assert steps_of_each(data, 1, 11) == steps_of_each(data, 1000, 2) == 10


def test_the_steps_are_those_of_the_seed():
    data = trajectories(12, 10, labels=3)
    first, again, other = (coherent_inputs(data, 48, 2, "x", seed) for seed in (0, 0, 1))
    assert torch.equal(first.sample, again.sample)
    assert not torch.equal(first.sample, other.sample)


def test_there_are_always_two_images():
    assert len(coherent_inputs(trajectories(5, 8), 1, 2, "x", 0)) == 16
    guided = coherent_inputs(trajectories(5, 8, guided=True), 1, 2, "x", 0)
    assert len(guided) == 32 and guided.trajectory.unique().tolist() == [0, 1]


@pytest.mark.parametrize("guided", [False, True])
def test_too_few_trajectories_are_named(guided):
    with pytest.raises(StepQuantError, match="step 'x' has 1 calibration trajectory: expected"):
        coherent_inputs(trajectories(1, 8, guided), 64, 2, "x", 0)


def test_all_inputs_of_an_image_and_step_side_by_side():
    data = trajectories(3, 4, guided=True)
    found = coherent_inputs(data, 24, 2, "x", 0)
    index = torch.tensor([0, 3, 9])  # steps 0 and 3 of image 0, step 1 of image 2
    both = found.take(of_all_kinds(index, 4, 2)).sample.flatten()
    assert both.tolist() == [30, 100_030, 0, 100_000, 2020, 102_020]
    assert torch.equal(of_all_kinds(index, 4, 1), index)


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


def test_blocks_are_trained_on_a_few_steps_of_all_labelled_trajectories(one_thread):
    session = session_of("dit", 4, 4, steps=6)
    options = {"iterations": 8, "batch": 4, "samples": 16, "steps_together": 2}
    data = training_inputs(session, "x", 16, 2)
    assert len(data) == 16 and data.trajectory.tolist() == [0] * 8 + [1] * 8
    BlockDistillation(**options).apply(session)
    records = session.summary["block_distillation"]
    assert sum(r["loss_after"] for r in records) < sum(r["loss_before"] for r in records)


def test_the_recipe_trains_on_shared_errors():
    first, step, last = load_recipe("stepquant").steps
    assert first.name == "input_error_bypass"
    assert step.steps_together == last.steps_together == 8
