from __future__ import annotations

import pytest
import torch
from pydantic import ConfigDict

from quantize_runs import SMALL
from stepquant.calibration.block_inputs import BlockData
from stepquant.methods import BlockDistillation, TemporalQuantizer
from stepquant.support.errors import StepQuantError
from stepquant.support.work_folder import WorkFolder

TINY = {"iterations": 16, "batch": 8, "samples": 32}
ATTENTION = "mid_block.attentions.0"


def ready(tiny_session, **options):
    """A session with tables and ranges, quantizing."""
    session = tiny_session(**{"weights": 4, "activations": 4, "num": 8, "steps": 4, **options})
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    return session


@torch.no_grad()
def hooked(model, name, data):
    """Arguments and output of `name` in one plain forward of all of `data`."""
    calls = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _m, args, output: calls.append((args, output.clone()))
    )
    model(data.sample, data.timestep)
    handle.remove()
    (call,) = calls
    return call


@torch.no_grad()
def held_out_loss(session, block, data):
    """Mean squared error over the mean square of the target, on the last eighth."""
    index = torch.arange(len(data) - len(data) // 8, len(data))
    args, kwargs, target, timestep = data.batch(index)
    session.context.set_timestep(timestep)
    found = block(*args, **kwargs)
    return float((found - target).square().mean() / data.target.square().mean())


class Watched(BlockDistillation):
    """Calls `look(when, name, block, data, losses)` before and after each block's training."""

    model_config = ConfigDict(extra="allow", frozen=False)

    def _train(self, session, name, block, data, generator):
        self.look("before", name, block, data, None)
        losses = super()._train(session, name, block, data, generator)
        self.look("after", name, block, data, losses)
        return losses


def watched(look, **settings):
    step = Watched(**{**TINY, **settings})
    step.look = look
    return step


@pytest.fixture(scope="module")
def trained(tiny_session):
    """A session after distillation, with what each block was given and its losses measured."""
    session = ready(tiny_session)
    subset = session.trajectories.subset(32, 0)
    seen = {}

    def look(when, name, block, data, losses):
        measured = held_out_loss(session, block, data)
        if when == "before":
            # The chain as it is now: all blocks before this one are trained.
            quantized, _ = hooked(session.model, name, subset)
            floating, target = hooked(session.float_model, name, subset)
            seen[name] = {
                "data": data,
                "quantized": quantized,
                "float": floating,
                "target": target,
                "before": measured,
            }
        else:
            seen[name] |= {"after": measured, "losses": losses}

    watched(look).apply(session)
    return session, subset, seen


def test_every_block_is_distilled_once_in_execution_order(trained):
    session, _, seen = trained
    records = session.summary["block_distillation"]
    assert [record["block"] for record in records] == list(seen)
    assert sorted(seen) == sorted(session.adapter.blocks(session.float_model))
    assert list(seen)[:2] == ["time_embedding", "conv_in"]
    assert list(seen)[-1] == "conv_out"


def test_inputs_are_those_of_the_chain_quantized_so_far(trained):
    _, _, seen = trained
    for name, block in seen.items():
        for found, expected in zip(block["data"].args, block["quantized"], strict=True):
            if isinstance(expected, torch.Tensor):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, msg=name)
    # The two chains differ, or the comparison says nothing.
    quantized, floating = (seen["conv_out"][chain][0] for chain in ("quantized", "float"))
    assert not torch.allclose(quantized, floating, rtol=0.05, atol=0.05)


def test_targets_are_those_of_the_float_chain(trained):
    _, subset, seen = trained
    for name, block in seen.items():
        torch.testing.assert_close(
            block["data"].target, block["target"], rtol=1e-4, atol=1e-4, msg=name
        )
        assert torch.equal(block["data"].timestep, subset.timestep)


def test_the_losses_told_are_those_of_the_block_before_and_after(trained):
    session, _, seen = trained
    for record in session.summary["block_distillation"]:
        block = seen[record["block"]]
        assert record["loss_before"] == pytest.approx(block["before"], rel=1e-3)
        assert record["loss_after"] == pytest.approx(block["after"], rel=1e-3)


def test_most_blocks_improve_and_none_ends_above_its_start(trained):
    session, _, seen = trained
    records = session.summary["block_distillation"]
    assert all(block["after"] <= block["before"] * (1 + 1e-6) for block in seen.values())
    improved = [r for r in records if r["loss_after"] < 0.97 * r["loss_before"]]
    assert len(improved) > len(records) / 2


def test_the_output_of_the_whole_model_comes_nearer_to_the_float_one(trained, tiny_session):
    session, subset, _ = trained
    untrained = ready(tiny_session)
    with torch.no_grad():
        target = session.float_model(subset.sample, subset.timestep).sample
        errors = [
            (s.model(subset.sample, subset.timestep).sample - target).square().mean().item()
            for s in (session, untrained)
        ]
    assert errors[0] < 0.9 * errors[1]


def test_weights_scales_tables_and_zero_points_are_trained_together(trained, tiny_session):
    session, _, _ = trained
    untrained = ready(tiny_session).model.state_dict()
    moved = {name for name, v in session.model.state_dict().items() if (v != untrained[name]).any()}
    for leaf in (
        "conv1.weight",
        "conv1.bias",
        "conv1.weight_quantizers.0.scale",
        "conv1.activation_quantizers.0.scale",
        "conv1.activation_quantizers.0.zero_point",
    ):
        assert any(name.endswith(leaf) for name in moved), leaf
    assert not any("norm" in name or "inverse_channel_scale" in name for name in moved)
    assert not any(name.endswith("weight_quantizers.0.zero_point") for name in moved)


def test_no_gradient_and_no_hook_stays_behind(trained):
    session, _, _ = trained
    assert all(parameter.grad is None for parameter in session.model.parameters())
    # The step context's own: what it knows of a call ends with the call.
    assert [m for m in session.model.modules() if m._forward_hooks] == [session.model]
    assert [m for m in session.model.modules() if m._forward_pre_hooks] == [session.model]


def test_the_float_model_is_left_alone(trained, tiny_unet):
    session, _, _ = trained
    for name, value in tiny_unet().state_dict().items():
        assert torch.equal(session.float_model.state_dict()[name], value), name


def test_float_inputs_are_those_of_the_float_chain(tiny_session):
    session = ready(tiny_session, **SMALL)
    subset = session.trajectories.subset(32, 0)
    compared = []

    def look(when, name, _block, data, _losses):
        if when == "before":
            floating, target = hooked(session.float_model, name, subset)
            torch.testing.assert_close(data.args[0], floating[0], rtol=1e-4, atol=1e-4, msg=name)
            torch.testing.assert_close(data.target, target, rtol=1e-4, atol=1e-4, msg=name)
            compared.append(name)

    watched(look, float_inputs=True, iterations=2).apply(session)
    assert len(compared) == 9


def test_no_iterations_leave_everything_bitwise_alone(tiny_session):
    session = ready(tiny_session)
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    BlockDistillation(iterations=0, batch=8, samples=32).apply(session)
    for name, value in session.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for record in session.summary["block_distillation"]:
        assert record["loss_after"] == record["loss_before"] > 0


def test_absurd_rates_leave_every_block_as_it_was_or_better(tiny_session):
    """The guard: each block keeps the best parameters it has had."""
    session = ready(tiny_session, **SMALL)
    entered, worse = {}, []

    def look(when, name, block, data, _losses):
        if when == "before":
            entered[name] = (
                {k: v.clone() for k, v in block.state_dict().items()},
                held_out_loss(session, block, data),
            )
            return
        state, loss = entered[name]
        now = held_out_loss(session, block, data)
        assert now <= loss * (1 + 1e-6), name
        same = all(torch.equal(value, state[key]) for key, value in block.state_dict().items())
        worse.append(same)

    watched(look, iterations=4, weight_rate=1e3, scale_rate=1e3, activation_rate=1e3).apply(session)
    assert sum(worse) > 4  # nothing that was tried was better


def test_held_out_inputs_are_never_trained_on(tiny_session, monkeypatch):
    session = ready(tiny_session, **SMALL)
    used = {True: set(), False: set()}
    batch = BlockData.batch

    def spy(self, index):
        used[torch.is_grad_enabled()] |= set(index.tolist())
        return batch(self, index)

    monkeypatch.setattr(BlockData, "batch", spy)
    BlockDistillation(**{**TINY, "iterations": 8}).apply(session)
    assert used[False] == {28, 29, 30, 31}
    assert used[True] <= set(range(28))
    assert len(used[True]) > 20


def test_the_same_seed_gives_the_same_bits(tiny_session, one_thread):
    def state(seed):
        session = ready(tiny_session, num=4, **SMALL)
        session.seed = seed
        BlockDistillation(iterations=2, batch=4, samples=16).apply(session)
        return session.model.state_dict()

    first, again, other = (state(seed) for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


def test_sequential_batches_are_of_one_step_each_from_the_training_inputs():
    timestep = torch.arange(5).repeat(10) * 10
    train = torch.arange(100, 150)
    step = BlockDistillation(iterations=30, batch=6, step_order="sequential")
    batches = step._one_step_each(timestep, train, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == [6] * 30
    assert all(torch.isin(batch, train).all() for batch in batches)
    assert all(timestep[batch - 100].unique().numel() == 1 for batch in batches)
    walked = [int(timestep[batch - 100][0]) for batch in batches]
    assert walked == [40, 30, 20, 10, 0] * 6


def test_sequential_training_sees_one_step_at_a_time(tiny_session, monkeypatch):
    session = ready(tiny_session, num=4, **SMALL)
    steps = []
    set_timestep = session.context.set_timestep

    def spy(timestep):
        if torch.is_grad_enabled():
            steps.append(torch.as_tensor(timestep).unique().numel())
        set_timestep(timestep)

    monkeypatch.setattr(session.context, "set_timestep", spy)
    BlockDistillation(iterations=4, batch=4, samples=16, step_order="sequential").apply(session)
    assert steps == [1] * 4 * 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_block_and_step(tiny_session, bad):
    session = ready(tiny_session, num=4, **SMALL)
    session.float_model.get_submodule(ATTENTION).to_out[0].bias.data.fill_(bad)
    with pytest.raises(
        StepQuantError, match=rf"loss of block '{ATTENTION}' is nan in step 'block_distillation'"
    ):
        BlockDistillation(iterations=1, batch=4, samples=16).apply(session)


def test_a_single_calibration_input_is_refused(tiny_session):
    session = ready(tiny_session, num=1, steps=1, **SMALL)
    with pytest.raises(StepQuantError, match="1 calibration input: expected at least 2"):
        BlockDistillation(**TINY).apply(session)


def test_few_inputs_are_enough(tiny_session):
    session = ready(tiny_session, num=1, steps=2, **SMALL)
    BlockDistillation(iterations=1, batch=4).apply(session)
    assert len(session.summary["block_distillation"]) == 9


def test_ranges_are_made_where_no_step_has_asked_for_them(tiny_session):
    session = tiny_session(num=4, **SMALL)
    BlockDistillation(iterations=0, batch=4, samples=16).apply(session)
    assert session.ranges_ready
    assert all(layer.quantizing for layer in session.layers().values())


def test_finished_blocks_are_taken_from_the_work_folder(tiny_session, tmp_path, one_thread):
    settings = {"iterations": 2, "batch": 4, "samples": 16}
    job = {"a": 1}
    first = ready(tiny_session, num=4, **SMALL, work=WorkFolder(tmp_path / "work", job, False))
    BlockDistillation(**settings).apply(first)
    files = sorted((tmp_path / "work" / "block_distillation").iterdir())
    assert len(files) == 9
    assert files[0].name == "000-time_embedding.safetensors"
    for file in files[5:]:
        file.unlink()
    again = ready(tiny_session, num=4, **SMALL, work=WorkFolder(tmp_path / "work", job, True))
    trained_now = []
    step = watched(lambda when, name, *_: trained_now.append(name), **settings)
    step.apply(again)
    assert len(set(trained_now)) == 4
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    for a, b in zip(
        first.summary["block_distillation"], again.summary["block_distillation"], strict=True
    ):
        assert a["block"] == b["block"]
        assert a["loss_after"] == pytest.approx(b["loss_after"])
