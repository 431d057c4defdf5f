import pytest
import torch
from pydantic import ValidationError

from quantize_runs import SMALL
from stepquant.methods import AlignedDistillation, BlockDistillation, TemporalQuantizer
from stepquant.workfolder import WorkFolder

TINY = {"iterations": 8, "later_iterations": 4, "batch": 8, "samples": 32}


def ready(tiny_session, **options):
    bits = {"weights": 3, "activations": 4}
    session = tiny_session(**{**bits, "num": 8, "steps": 4, **SMALL, **options})
    TemporalQuantizer().apply(session)
    return session


def equal_states(a, b):
    return all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())


def test_no_rounds_are_block_distillation(tiny_session, one_thread):
    ours, theirs = ready(tiny_session), ready(tiny_session)
    AlignedDistillation(rounds=0, **TINY).apply(ours)
    settings = {key: value for key, value in TINY.items() if key != "later_iterations"}
    BlockDistillation(**settings).apply(theirs)
    assert equal_states(ours, theirs)
    assert ours.summary["aligned_distillation"] == [theirs.summary["block_distillation"]]


@pytest.mark.parametrize(("share", "own"), [(0.25, 8), (1.0, 32)])
def test_later_rounds_train_on_their_share_of_own_inputs(share, own, tiny_session, monkeypatch):
    session = ready(tiny_session)
    draw, drawn, trained = session.draw, [], []

    def watch(num, seed, denoiser=None):
        found = draw(num, seed, denoiser)
        drawn.append(found.sample)
        return found

    def note(self, session, key, data):
        trained.append(data)
        session.summary[key] = []

    session.draw = watch
    monkeypatch.setattr(AlignedDistillation, "distil", note)
    AlignedDistillation(rounds=2, own_share=share, **TINY).apply(session)
    first, *later = trained
    for data, samples in zip(later, drawn, strict=True):
        assert len(data) == len(first) == 32
        of_own = [any(torch.equal(x, y) for y in samples) for x in data.sample]
        of_first = [any(torch.equal(x, y) for y in first.sample) for x in data.sample]
        # The very first step is noise, which both know.
        assert sum(of_own) >= own
        assert sum(of_first) >= 32 - own
        assert all(a or b for a, b in zip(of_own, of_first, strict=True))


def test_no_round_ends_above_where_it_started(tiny_session):
    session = ready(tiny_session)
    AlignedDistillation(rounds=2, **TINY).apply(session)
    rounds = session.summary["aligned_distillation"]
    assert len(rounds) == 3
    for records in rounds:
        assert records
        assert all(record["loss_after"] <= record["loss_before"] for record in records)


class Killed(Exception):
    pass


@pytest.mark.parametrize("number", [0, 1, 2])
def test_after_a_kill_in_any_round_it_ends_with_the_same_bits(
    number, tiny_session, tmp_path, one_thread, monkeypatch
):
    whole = ready(tiny_session)
    AlignedDistillation(rounds=2, **TINY).apply(whole)
    killed = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, False))
    train, trained = AlignedDistillation._train, []

    def deadly(self, session, name, *more):
        trained.append(name)
        if len(trained) > number * len(whole.summary["aligned_distillation"][0]) + 2:
            raise Killed
        return train(self, session, name, *more)

    with monkeypatch.context() as patch:
        patch.setattr(AlignedDistillation, "_train", deadly)
        with pytest.raises(Killed):
            AlignedDistillation(rounds=2, **TINY).apply(killed)
    resumed = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, True))
    AlignedDistillation(rounds=2, **TINY).apply(resumed)
    assert equal_states(whole, resumed)
    assert whole.summary == resumed.summary


@pytest.mark.parametrize("settings", [{"rounds": -1}, {"own_share": 1.1}, {"own_share": 0.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError, match=next(iter(settings))):
        AlignedDistillation(**settings)
