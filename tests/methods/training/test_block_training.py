from __future__ import annotations

import pytest
import torch
from torch import nn

from quantize_runs import SMALL
from stepquant.calibration.block_inputs import capture_inputs
from stepquant.calibration.block_replay import Replayable
from stepquant.calibration.observe import quant_layers
from stepquant.methods import BlockDistillation, TemporalQuantizer
from stepquant.methods.training import block_training, guarded_block
from stepquant.methods.training.block_training import (
    _forgotten,
    most_kept,
    train_blocks,
    training_inputs,
)


def ready(tiny_session, **options):
    """A session with tables and ranges, quantizing."""
    session = tiny_session(weights=4, activations=4, steps=4, **SMALL, **options)
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    return session


def test_outputs_are_kept_until_their_last_reader_is_done():
    order = ["a", "b", "c", "d"]
    kept = {"a": Replayable(3, 100), "b": Replayable(2, 10), "d": Replayable(-1, 1000)}
    # After a: a. After b: a and b. After c: a. After d: none.
    assert most_kept(order, kept) == 110
    assert most_kept(order, {}) == 0


def test_what_is_forgotten_has_its_shape_and_takes_no_room():
    output = (torch.randn(64, 3, 5), None)
    tensor, nothing = _forgotten(output, 64)
    assert nothing is None and tensor.shape == (64, 3, 5)
    assert tensor.untyped_storage().nbytes() == 4 * 3 * 5


def test_blocks_run_again_where_their_outputs_would_take_too_much_room(
    tiny_session, monkeypatch, one_thread
):
    def train():
        session = tiny_session(weights=4, activations=4, num=4, steps=4)
        TemporalQuantizer().apply(session)
        calls = []
        session.model.get_submodule("conv_in").register_forward_hook(
            lambda _m, args, _y: None if torch.is_grad_enabled() else calls.append(len(args[0]))
        )
        BlockDistillation(iterations=1, batch=4, samples=16).apply(session)
        return session.model.state_dict(), sum(calls)

    replayed, few = train()
    monkeypatch.setattr(block_training, "BYTES_OF_OUTPUTS", 0)
    again, many = train()
    assert many > 5 * few
    for key, value in replayed.items():
        assert torch.equal(value, again[key]), key


def test_blocks_of_float_layers_only_are_passed_over(tiny_session):
    session = ready(tiny_session, num=4)
    conv = session.float_model.conv_out
    session.model.conv_out = nn.Conv2d(16, 1, 3, padding=1)
    session.model.conv_out.load_state_dict(conv.state_dict())
    BlockDistillation(iterations=0, batch=4, samples=16).apply(session)
    blocks = [record["block"] for record in session.summary["block_distillation"]]
    assert "conv_out" not in blocks
    assert len(blocks) == 8


def test_targets_that_do_not_fit_at_once_are_made_in_parts(tiny_session, monkeypatch):
    session, whole = ready(tiny_session, num=4), ready(tiny_session, num=4)
    settings = {"iterations": 1, "batch": 4, "samples": 16}
    BlockDistillation(**settings).apply(whole)
    passes = []
    handle = session.float_model.register_forward_pre_hook(lambda _m, args: passes.append(1))
    monkeypatch.setattr(block_training, "BYTES_OF_TARGETS", 200_000)
    BlockDistillation(**settings).apply(session)
    handle.remove()
    assert len(passes) > 6  # an ordinary run has two batches and one probe
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(session.model.state_dict()[name], value, msg=name)


def test_each_block_gets_what_the_whole_chain_gives(tiny_session):
    """Finished blocks are replayed; what a block is trained on is that of a plain forward."""
    session = ready(tiny_session, num=8)
    data = training_inputs(session, "test", 16)
    compared = []

    def train(name, block, examples, _generator):
        args, kwargs = capture_inputs(session.model, name, data, 8)
        assert kwargs.keys() == examples.kwargs.keys()
        for found, expected in zip(examples.args, args, strict=True):
            assert torch.equal(found, expected), name
        for layer in quant_layers(block).values():
            layer.weight.data.mul_(1.01)  # as training would
        compared.append(name)
        return 1.0, 1.0

    train_blocks(session, "test", "testing", data, 4, train)
    assert len(compared) == 9


@pytest.mark.parametrize("name", ["GuardedBlock", "is_check", "mixed_batches"])
def test_names_that_moved_serve_for_one_release(name):
    with pytest.warns(DeprecationWarning, match=rf"{name} is now .*\.guarded_block\.{name}: "):
        found = getattr(block_training, name)
    assert found is getattr(guarded_block, name)
