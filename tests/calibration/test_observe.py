from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.calibration.observe import (
    TAIL_PER_STEP,
    VALUES_PER_STEP,
    Observation,
    observe,
    outermost,
    quant_layers,
    tails_and_draw,
)
from stepquant.calibration.trajectories import Trajectories
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def session(tiny_session):
    return tiny_session(num=3)


def seen(session, **changes):
    options = {"per_step": 3, "seed": 0, "reporter": QUIET, **changes}
    return observe(session.model, session.trajectories, **options)


def test_the_simulated_layers_are_all_the_convs_and_linears(session):
    expected = {
        name
        for name, module in session.float_model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    assert set(quant_layers(session.model)) == expected
    assert len(expected) == 50


def test_extremes_are_exact_for_each_channel_and_step(session):
    name, step = "down_blocks.0.resnets.0.conv1", 1
    inputs = []
    handle = session.float_model.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: inputs.append(args[0])
    )
    trajectories = session.trajectories
    with torch.no_grad():
        session.float_model(trajectories.step(step).sample, trajectories.timesteps[step])
    handle.remove()
    found = seen(session)[name, 0]
    assert len(found.low) == len(found.high) == len(found.values) == 3
    channels = inputs[0].movedim(1, 0).flatten(1)  # [C, *]
    torch.testing.assert_close(found.low[step], channels.amin(dim=1))
    torch.testing.assert_close(found.high[step], channels.amax(dim=1))
    assert found.values[step].min() == found.low[step].min()
    assert found.values[step].max() == found.high[step].max()
    assert found.weights[step].sum().item() == pytest.approx(channels.numel(), rel=1e-5)


def test_values_are_drawn_from_the_input(session):
    for (name, part), found in seen(session).items():
        for low, high, values in zip(found.low, found.high, found.values, strict=True):
            assert values.min() >= low.min(), (name, part)
            assert values.max() <= high.max(), (name, part)
    inputs = seen(session)["conv_in", 0].values[0]
    assert torch.isin(inputs, session.trajectories.step(0).sample).all()


def test_tails_are_kept_exactly_and_the_rest_is_drawn():
    flat = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).exp()
    values, weights = tails_and_draw(flat, torch.Generator().manual_seed(1))
    assert values.shape == weights.shape == (VALUES_PER_STEP + 2 * TAIL_PER_STEP,)
    ordered = flat.sort().values
    low, drawn, high = values.split([TAIL_PER_STEP, VALUES_PER_STEP, TAIL_PER_STEP])
    assert torch.equal(low, ordered[:TAIL_PER_STEP])
    assert torch.equal(high, ordered.flip(0)[:TAIL_PER_STEP])
    assert torch.isin(drawn, ordered[TAIL_PER_STEP - 1 : 1 - TAIL_PER_STEP]).all()
    assert len(drawn.unique()) > VALUES_PER_STEP / 2
    # Each value of a tail stands for itself, and together they stand for all of the input.
    assert (weights.split([TAIL_PER_STEP, VALUES_PER_STEP, TAIL_PER_STEP])[0] == 1).all()
    assert weights.sum().item() == pytest.approx(10_000, rel=1e-5)
    assert (values * weights).sum() / weights.sum() == pytest.approx(float(flat.mean()), rel=0.05)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("size", [64, 8192, 8256, 9001, 20_011])
@pytest.mark.parametrize("kind", ["spread", "crowded", "ties"])
def test_the_outermost_values_are_those_of_a_full_sort(kind, size, largest):
    flat = torch.randn(size, generator=torch.Generator().manual_seed(size))
    if kind == "crowded":  # all of one end in neighbouring places, also in the last, short row
        flat[-60:] = torch.arange(60.0) * (10 if largest else -10)
    elif kind == "ties":
        flat = flat.round()
    expected = flat.sort(descending=largest).values[:64]
    assert torch.equal(outermost(flat, 64, largest), expected)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 100])
def test_a_small_input_is_drawn_from_all_of_it(size):
    flat = torch.arange(float(size))
    values, weights = tails_and_draw(flat, torch.Generator().manual_seed(1))
    assert set(values.tolist()) <= set(flat.tolist())
    assert values.min() == 0
    assert values.max() == size - 1
    assert (weights > 0).all()
    assert weights.sum().item() == pytest.approx(size, rel=1e-5)


def test_both_parts_of_a_skip_input_are_seen(session):
    name = "up_blocks.0.resnets.0.conv1"
    layer = session.layers()[name]
    observations = seen(session)
    assert layer.splits == (16, 16)
    assert [observations[name, part].low[0].shape for part in (0, 1)] == [(16,), (16,)]
    assert not torch.equal(observations[name, 0].low[0], observations[name, 1].low[0])


def test_no_more_than_the_wanted_samples_of_a_step_are_seen(session):
    one = session.trajectories.step(0, 1).sample
    found = seen(session, per_step=1)["conv_in", 0]
    assert found.low[0].item() == one.min()
    assert found.high[0].item() == one.max()


def test_the_sample_of_values_depends_on_the_seed_alone(session):
    first, again, other = (seen(session, seed=seed)["conv_out", 0] for seed in (0, 0, 1))
    assert torch.equal(torch.stack(first.values), torch.stack(again.values))
    assert not torch.equal(torch.stack(first.values), torch.stack(other.values))


def test_observing_leaves_no_hook_behind(session):
    seen(session)
    assert not any(layer._forward_pre_hooks for layer in session.layers().values())


def test_the_scaling_of_the_input_is_part_of_what_is_seen(tiny_session):
    session = tiny_session()
    before = seen(session)["conv_out", 0]
    session.layers()["conv_out"].multiply_channel_scale(torch.full((16,), 4.0))
    after = seen(session)["conv_out", 0]
    torch.testing.assert_close(torch.stack(after.high), torch.stack(before.high) / 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_sample_names_the_first_layer_and_the_timestep(session, bad):
    whole = session.trajectories
    poisoned = whole.sample.clone()
    second = whole.timesteps[1]
    poisoned[(whole.timestep == second).nonzero()[0], 0, 3, 4] = bad
    trajectories = Trajectories(poisoned, whole.timestep, whole.trajectory, whole.timesteps)
    with pytest.raises(StepQuantError, match=f"layer 'conv_in' .* at timestep {second}:"):
        observe(session.model, trajectories, 3, 0, QUIET)
    assert not any(layer._forward_pre_hooks for layer in session.layers().values())


def test_weights_that_overflow_name_the_layer_after_them(tiny_session):
    session = tiny_session()
    session.layers()["down_blocks.0.resnets.0.conv1"].weight.data.mul_(1e38)
    with pytest.raises(
        StepQuantError, match=r"layer 'down_blocks\.0\.resnets\.0\.conv2' .* at timestep 666:"
    ):
        seen(session)


def test_a_module_that_gives_nan_at_one_step_is_told_by_layer_and_step(session):
    last = session.trajectories.timesteps[-1]
    norm = session.model.mid_block.attentions[0].group_norm

    def poison(_module, _args, output):
        at = session.context.grid.timesteps[session.context.rows[0]]
        return output * float("nan") if at == last else output

    handle = norm.register_forward_hook(poison)
    try:
        with pytest.raises(
            StepQuantError, match=rf"layer 'mid_block\.attentions\.0\.to_q' .* timestep {last}:"
        ):
            seen(session)
    finally:
        handle.remove()


def test_steps_with_fewer_values_end_with_values_that_weigh_nothing():
    lengths, steps = (5, 9, 2), 3
    rows = [torch.arange(1.0, n + 1) for n in lengths]
    found = Observation()
    for row in rows:
        found.add(steps, low=row[:1], high=row[-1:], values=row, weights=torch.ones(len(row)))
    values, weights = torch.stack(found.values), torch.stack(found.weights)
    assert values.shape == weights.shape == (steps, max(lengths))
    for row, of_step, weight in zip(rows, values, weights, strict=True):
        assert torch.equal(of_step[: len(row)], row)
        assert (of_step[len(row) :] == row[-1]).all()
        assert weight.tolist() == [1.0] * len(row) + [0.0] * (max(lengths) - len(row))


@pytest.mark.parametrize(
    ("called", "taken"),
    [((1, 1, 1), (0, 1, 2)), ((0, 1, 0), (1, 1, 1)), ((1, 0, 1), (0, 0, 2)), ((0, 0, 1), (2,) * 3)],
)
def test_a_step_without_a_call_has_the_statistics_of_the_nearest_one_before(
    session, monkeypatch, called, taken
):
    """Or of the first step with a call."""
    name = "mid_block.resnets.0.conv1"
    layer = session.model.get_submodule(name)
    everywhere = seen(session)[name, 0]
    step, original = iter(called), nn.Module.__call__

    def sometimes(module, *args, **kwargs):
        if module is layer and not next(step):
            return torch.zeros_like(args[0])
        return original(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", sometimes)
    found = seen(session)[name, 0]
    assert len(found.low) == len(called)
    for row, source in enumerate(taken):
        assert torch.equal(found.low[row], everywhere.low[source])
        assert torch.equal(found.high[row], everywhere.high[source])
