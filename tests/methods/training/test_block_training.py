from __future__ import annotations

import torch

from stepquant.calibration.block_replay import Replayable
from stepquant.methods import BlockDistillation, TemporalQuantizer
from stepquant.methods.training import block_training
from stepquant.methods.training.block_training import _forgotten, most_kept


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
