import pytest
import torch
from pydantic import ValidationError

from quantize_runs import SMALL
from stepquant.methods import BlockReconstruction, ProgressiveAlignment, TemporalQuantizer
from stepquant.support.work_folder import WorkFolder

TINY = {"iterations": 8, "later_iterations": 4, "batch": 8, "samples": 32}


def ready(tiny_session, **options):
    bits = {"weights": 3, "activations": 4}
    session = tiny_session(**{**bits, "num": 8, "steps": 4, **SMALL, **options})
    TemporalQuantizer().apply(session)
    return session


def equal_states(a, b):
    return all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


def test_no_rounds_are_block_reconstruction(tiny_session, one_thread):
    ours, theirs = ready(tiny_session), ready(tiny_session)
    ProgressiveAlignment(rounds=0, **TINY).apply(ours)
    settings = {key: value for key, value in TINY.items() if key != "later_iterations"}
    BlockReconstruction(**settings).apply(theirs)
    assert equal_states(ours, theirs)
    assert ours.summary["progressive_alignment"] == [theirs.summary["block_reconstruction"]]


def test_each_round_draws_with_the_model_as_it_is_then(tiny_session):
    session = ready(tiny_session)
    draw, drawn = session.draw, []

    def watch(num, seed, denoiser=None, reporter=None):
        drawn.append((num, seed, {k: v.clone() for k, v in denoiser.state_dict().items()}))
        return draw(num, seed, denoiser, reporter)

    session.draw = watch
    ProgressiveAlignment(rounds=2, **TINY).apply(session)
    assert [(num, seed) for num, seed, _ in drawn] == [(8, 4_000_000), (8, 4_000_008)]
    first, second = drawn[0][2], drawn[1][2]
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_no_round_ends_above_where_it_started(tiny_session):
    session = ready(tiny_session)
    ProgressiveAlignment(rounds=2, **TINY).apply(session)
    rounds = session.summary["progressive_alignment"]
    assert len(rounds) == 3
    for records in rounds:
        assert records
        for record in records:
            assert record["loss_after"] <= record["loss_before"]


class Killed(Exception):
    pass


@pytest.mark.parametrize("number", [0, 1, 2])
def test_after_a_kill_in_any_round_it_ends_with_the_same_bits(
    number, tiny_session, tmp_path, one_thread, monkeypatch
):
    whole = ready(tiny_session)
    ProgressiveAlignment(rounds=2, **TINY).apply(whole)
    killed = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, False))
    train, trained = ProgressiveAlignment._train, []

    def deadly(self, session, weights, name, *more):
        trained.append(name)
        if len(trained) > number * len(whole.summary["progressive_alignment"][0]) + 2:
            raise Killed
        return train(self, session, weights, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressiveAlignment, "_train", deadly)
        with pytest.raises(Killed):
            ProgressiveAlignment(rounds=2, **TINY).apply(killed)
    resumed = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, True))
    ProgressiveAlignment(rounds=2, **TINY).apply(resumed)
    assert equal_states(whole, resumed)
    assert whole.summary == resumed.summary


def test_fewer_than_no_rounds_are_refused():
    with pytest.raises(ValidationError, match="rounds"):
        ProgressiveAlignment(rounds=-1)
