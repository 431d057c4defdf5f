from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.calibration.block_inputs import (
    BlockData,
    capture_inputs,
    capture_outputs,
    execution_order,
)
from stepquant.calibration.trajectories import Trajectories
from stepquant.support.errors import StepQuantError

NAMES = ["conv_in", "down_blocks.0.resnets.0", "up_blocks.0.resnets.0", "mid_block.attentions.0"]


@pytest.fixture(scope="module")
def session(tiny_session):
    return tiny_session()


@torch.no_grad()
def hooked(model, name, data):
    """Arguments and output of `name` in one plain forward of all of `data`."""
    calls = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _m, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    model(data.sample, data.timestep)
    handle.remove()
    (call,) = calls
    return call


def close(found, expected):
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert found == expected


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_those_of_a_plain_forward_whatever_the_batch(session, name, batch):
    data = session.trajectories
    args, kwargs, _ = hooked(session.float_model, name, data)
    found_args, found_kwargs = capture_inputs(session.float_model, name, data, batch)
    assert len(found_args) == len(args)
    assert found_kwargs.keys() == kwargs.keys()
    for found, expected in zip(found_args, args, strict=True):
        close(found, expected)
    for key, expected in kwargs.items():
        close(found_kwargs[key], expected)


def test_a_resnet_gets_the_hidden_state_and_the_time_embedding_of_each_sample(session):
    args, _ = capture_inputs(session.float_model, "up_blocks.0.resnets.0", session.trajectories, 4)
    assert [tuple(value.shape) for value in args] == [(6, 32, 8, 8), (6, 64)]


def test_the_forward_stops_at_the_block(session):
    after = session.float_model.conv_out
    ran = []
    handle = after.register_forward_pre_hook(lambda _m, _a: ran.append(True))
    capture_inputs(session.float_model, "conv_in", session.trajectories, 4)
    handle.remove()
    assert ran == []


def test_outputs_of_all_blocks_come_from_one_pass(session):
    model, data = session.float_model, session.trajectories
    calls = []
    handle = model.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    found = capture_outputs(model, NAMES, data, 4)
    handle.remove()
    assert calls == [4, 2]
    assert list(found) == NAMES
    for name in NAMES:
        close(found[name], hooked(model, name, data)[2])


def test_nothing_captured_asks_for_a_gradient(session):
    args, _ = capture_inputs(session.model, "mid_block.resnets.0", session.trajectories, 4)
    (output,) = capture_outputs(session.model, ["conv_in"], session.trajectories, 4).values()
    assert not any(value.requires_grad for value in (*args, output))


def test_no_hook_stays_behind(session):
    model, data = session.float_model, session.trajectories
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    capture_inputs(model, "conv_in", data, 4)
    capture_outputs(model, NAMES, data, 4)
    execution_order(model, NAMES, data)
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert after == before


def test_execution_order_is_that_of_the_forward_not_of_the_registration(session):
    blocks = session.adapter.blocks(session.float_model)
    order = execution_order(session.float_model, blocks, session.trajectories)
    assert sorted(order) == sorted(blocks)
    assert order[:2] == ["time_embedding", "conv_in"]
    assert order[-1] == "conv_out"
    # Registered last, but it runs between the encoder and the decoder.
    position = {name: order.index(name) for name in order}
    assert position["down_blocks.1.resnets.0"] < position["mid_block.resnets.0"]
    assert position["mid_block.resnets.1"] < position["up_blocks.0.resnets.0"]
    assert position["up_blocks.0.resnets.0"] < position["up_blocks.0.attentions.0"]


def test_a_block_that_never_runs_has_no_place_in_the_order(session):
    model = session.float_model
    assert execution_order(model, ["conv_in", "conv_act"], session.trajectories) == [
        "conv_in",
        "conv_act",
    ]
    model.spare = torch.nn.Identity()
    try:
        assert execution_order(model, ["spare", "conv_in"], session.trajectories) == ["conv_in"]
    finally:
        del model.spare


def test_a_batch_picks_the_same_samples_of_everything():
    value = torch.arange(5.0)
    data = BlockData(
        (value.view(5, 1), None), {"emb": value + 10, "scale": 2.0}, value + 20, value + 30
    )
    args, kwargs, target, timestep = data.batch(torch.tensor([3, 0]))
    assert len(data) == 5
    assert args[0].tolist() == [[3.0], [0.0]]
    assert args[1] is None
    assert kwargs["emb"].tolist() == [13.0, 10.0]
    assert kwargs["scale"] == 2.0
    assert target.tolist() == [23.0, 20.0]
    assert timestep.tolist() == [33.0, 30.0]


class Mixed(nn.Module):
    """A block that is given a table of as many rows as there are samples, and gives two tensors."""

    def forward(self, x, pair, *, table):
        return x + pair[0], [table.sum() * pair[1]]


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = Mixed()

    def forward(self, sample, timestep):
        table = torch.arange(4.0).view(4, 1)
        return self.mixed(sample, (sample * 2, sample * 3), table=table)[0]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_tables_are_told_from_samples_whatever_the_batch(batch):
    model = WithTable()
    sample = torch.arange(8.0).view(4, 2)
    data = Trajectories(sample, torch.zeros(4), torch.arange(4), torch.zeros(1))
    args, kwargs = capture_inputs(model, "mixed", data, batch)
    examples = BlockData(args, kwargs, sample, data.timestep)
    (x, (double, triple)), named, _, _ = examples.batch(torch.tensor([3, 0]))
    assert torch.equal(x, sample[[3, 0]])
    assert torch.equal(double, 2 * x) and torch.equal(triple, 3 * x)
    assert torch.equal(named["table"], torch.arange(4.0).view(4, 1))
    output = capture_outputs(model, ["mixed"], data, batch)["mixed"]
    assert output.shape == (4, 4)  # both tensors that the block gives
    assert torch.equal(output, torch.cat([3 * sample, 18 * sample], dim=1))


class Flattened(nn.Module):
    """A denoiser whose blocks get sizes in two rows for each sample, or their mean for all."""

    def __init__(self):
        super().__init__()
        self.sizes, self.mean, self.conv = nn.Linear(1, 1), nn.Linear(1, 1), nn.Conv2d(1, 1, 1)

    def forward(self, sample, timestep):
        sizes = self.sizes(torch.stack([timestep, timestep], dim=1).float().view(-1, 1))
        mean = self.mean(timestep.float().mean().view(1))
        return self.conv(sample) + sizes.view(-1, 2).sum(dim=1).view(-1, 1, 1, 1) + mean


@pytest.mark.parametrize("block", ["sizes", "mean"])
def test_a_tensor_without_rows_that_changes_is_told(block):
    """Before, what the first batch had was taken for all."""
    steps = torch.tensor([3, 2, 1])
    data = Trajectories(torch.ones(6, 1, 2, 2), steps.repeat(2), torch.arange(6), steps)
    with pytest.raises(StepQuantError, match=f"the block '{block}' takes a tensor .* another one"):
        capture_inputs(Flattened(), block, data, 2)
