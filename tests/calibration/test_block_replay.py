from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.calibration.block_inputs import capture_inputs, capture_outputs, execution_order
from stepquant.calibration.block_replay import Replay, readers, replayable_blocks, replaying
from stepquant.calibration.trajectories import Trajectories


class Skip(nn.Module):
    """a -> b -> c, and a again beside c into d; e reads nothing but the result of d, doubled."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(2, 2))
        self.d = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        c = self.c(self.b(a).relu())
        return self.e(2 * self.d(torch.cat([a, c], dim=1)))


def outputs_of(model: nn.Module, names: str, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, name=name: found.setdefault(name, y.detach())
        )
    model(x)
    return found


def test_readers_are_followed_through_what_lies_between_blocks():
    model, x = Skip(), torch.randn(1, 2)
    outputs = outputs_of(model, "abcde", x)
    assert readers(model, list("abcde"), outputs, x) == {
        "a": {"b", "d"},
        "b": {"c"},
        "c": {"d"},
        "d": {"e"},
        "e": set(),
    }


def test_what_is_not_replayed_reads_for_those_behind_it():
    model, x = Skip(), torch.randn(1, 2)
    outputs = outputs_of(model, "abcde", x)
    del outputs["b"]  # runs for real: what it reads is read by c too
    assert readers(model, list("abcde"), outputs, x)["a"] == {"b", "c", "d"}


def test_stand_ins_give_what_was_recorded_and_leave_again():
    model, x = Skip(), torch.randn(3, 2)
    plain = model(x)
    blocks = dict(model.named_children())
    outputs = outputs_of(model, "ad", x)
    with replaying(model, outputs) as stands_in:
        assert len(stands_in) == 2
        assert model.a.weight is blocks["a"].weight  # all but the result is the block's own
        assert model.a.in_features == 2
        assert torch.equal(model(torch.zeros(3, 2)), plain)
        for stand_in in stands_in:
            stand_in.part = slice(1, 3)
        assert torch.equal(model(torch.zeros(2, 2)), plain[1:])
    assert dict(model.named_children()) == blocks
    with pytest.raises(ZeroDivisionError), replaying(model, outputs):
        1 / 0  # noqa: B018
    assert not any(isinstance(module, Replay) for module in model.modules())


def test_inputs_are_the_same_bits_with_all_blocks_before_replayed(tiny_session):
    session = tiny_session()
    model, data = session.float_model, session.trajectories
    order = execution_order(model, session.adapter.blocks(model), data)
    outputs = capture_outputs(model, order, data, 4)
    for index, name in enumerate(order):
        before = {known: outputs[known] for known in order[:index]}
        args, kwargs = capture_inputs(model, name, data, 4, before)
        plain_args, plain_kwargs = capture_inputs(model, name, data, 4)
        assert kwargs.keys() == plain_kwargs.keys()
        for found, expected in zip(args, plain_args, strict=True):
            assert torch.equal(found, expected), name


def test_skip_connections_are_read_until_the_decoder(tiny_session):
    session = tiny_session()
    model, data = session.float_model, session.trajectories
    order = execution_order(model, session.adapter.blocks(model), data)
    found = replayable_blocks(model, order, data)
    last = {name: block.last for name, block in found.items()}
    assert set(last) == set(order)
    resnets = [name for name in order if name.startswith("up_blocks")]
    # The first conv's output is the last skip connection to be read, and the time embedding's
    # is read by every resnet; the output conv's by no block.
    assert order[last["conv_in"]] == [name for name in resnets if ".resnets." in name][-1]
    assert last["time_embedding"] == last["conv_in"]
    assert last["conv_out"] == -1
    assert all(last[name] > index for index, name in enumerate(order[:-1]))


class Writing(nn.Module):
    """Glue that writes into a block's output, and a block that writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = (nn.Linear(4, 4) for _ in range(3))
        self.writer = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x += timestep[:, None]
        skip = self.first(x)
        return self.head(torch.cat([self.second(self.writer(skip)), skip], dim=1))


def test_what_writes_into_tensors_is_replayed_with_the_same_values():
    torch.manual_seed(0)
    model, order = Writing(), ["stem", "first", "writer", "second", "head"]
    steps = torch.tensor([1.0, 2.0, 3.0])
    data = Trajectories(torch.randn(3, 4), steps, torch.arange(3), steps)
    found = replayable_blocks(model, order, data)
    assert set(found) == {"stem", "first", "second", "head"}  # the skip is read after the writer
    assert order[found["first"].last] == "head"
    outputs = capture_outputs(model, order, data, 2)
    for index, name in enumerate(order):
        before = {known: outputs[known] for known in order[:index] if known in found}
        for _ in range(2):  # what is replayed is the same the second time
            (replayed,), _ = capture_inputs(model, name, data, 2, before)
            (plain,), _ = capture_inputs(model, name, data, 2)
            assert torch.equal(replayed, plain), name


class Indices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.largest = Largest()

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        values, _ = self.largest(self.first(x))
        return self.second(values.expand(-1, 4))


class Largest(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(x.max(dim=1, keepdim=True))


def test_whole_numbers_are_not_replayed():
    data = Trajectories(torch.randn(2, 4), torch.zeros(2), torch.arange(2), torch.zeros(1))
    found = replayable_blocks(Indices(), ["first", "largest", "second"], data)
    assert {name: block.last for name, block in found.items()} == {"first": 2, "second": -1}
    assert found["first"].nbytes == 16
