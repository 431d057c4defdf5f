from __future__ import annotations

import pytest
import torch

from stepquant.calibration.trajectories import predict
from stepquant.methods import LowRankAdapters, TemporalQuantizer, TrajectoryDistillation
from stepquant.support.errors import StepQuantError
from stepquant.support.work_folder import WorkFolder

TINY = {"rounds": 4, "batch": 2}


def ready(tiny_session, **options):
    session = tiny_session(**{"weights": 3, "activations": 4, "steps": 5, "num": 6, **options})
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    return session


def held_out_loss(session):
    data = session.trajectories
    with torch.no_grad():
        target = predict(session.float_model, data)
        found = predict(session.model, data)
    return float((found - target).square().sum() / target.square().sum())


@pytest.mark.parametrize("adapters", [False, True], ids=["weights", "adapters"])
def test_the_model_comes_nearer_to_the_float_one(adapters, tiny_session):
    session = ready(tiny_session)
    if adapters:
        LowRankAdapters(rank=4).apply(session)
    before = held_out_loss(session)
    TrajectoryDistillation(**TINY).apply(session)
    after, summary = held_out_loss(session), session.summary["trajectory_distillation"]
    assert after < 0.9 * before
    assert summary["loss_before"] == pytest.approx(before, rel=1e-4)
    assert summary["loss_after"] == pytest.approx(after, rel=1e-4)
    assert summary["updates"] == 4 * 5
    for layer in session.layers().values():
        assert layer.adapter is None
        assert all(parameter.grad is None for parameter in layer.parameters())


def test_with_adapters_the_weights_change_at_their_rank_and_biases_stay(tiny_session):
    session = ready(tiny_session)
    before = {n: (q.weight.clone(), q.bias) for n, q in session.layers().items()}
    biases = {n: None if q.bias is None else q.bias.clone() for n, q in session.layers().items()}
    LowRankAdapters(rank=2).apply(session)
    TrajectoryDistillation(**TINY).apply(session)
    for name, layer in session.layers().items():
        change = (layer.weight - before[name][0]).detach().flatten(1)
        values = torch.linalg.svdvals(change.double())
        assert values[0] > 0 and (values[2:] < 1e-4 * values[0]).all(), name
        assert biases[name] is None or torch.equal(layer.bias, biases[name])


def test_it_never_ends_worse_than_it_began(tiny_session):
    session = ready(tiny_session)
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    TrajectoryDistillation(**TINY, weight_rate=50, scale_rate=50, activation_rate=50).apply(session)
    assert all(torch.equal(before[k], v) for k, v in session.model.state_dict().items())


def test_no_rounds_leave_everything_alone(tiny_session):
    session = ready(tiny_session)
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    TrajectoryDistillation(rounds=0).apply(session)
    assert all(torch.equal(before[k], v) for k, v in session.model.state_dict().items())
    assert session.summary["trajectory_distillation"]["updates"] == 0


@torch.no_grad()
def test_errors_count_by_their_influence(tiny_session):
    session = ready(tiny_session)
    # A spectrum that is flat, other at each step.
    counts = torch.tensor([16.0, 8.0, 4.0, 2.0, 10.0])
    session.spectra[0.5] = (counts / counts.mean()).view(5, 1, 1).expand(5, 16, 16)
    data = session.trajectories
    plain = TrajectoryDistillation()
    weighted = TrajectoryDistillation(influence_exponent=0.5)
    errors, powers = [], []
    for row, count in enumerate(counts.tolist()):
        inputs = data.step(row)
        (ours, _), (theirs, _) = (step.losses(session, inputs) for step in (weighted, plain))
        assert float(ours) == pytest.approx(float(theirs) * count / 8, rel=1e-4)
        target = predict(session.float_model, inputs)
        found = predict(session.model, inputs)
        errors.append(count * float((found - target).square().sum()))
        powers.append(count * float(target.square().sum()))
    held_out = weighted._held_out_loss(session, own=False)
    assert held_out == pytest.approx(sum(errors) / sum(powers), rel=1e-4)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_windows_hold_consecutive_steps_of_the_same_images(window, tiny_session):
    session = ready(tiny_session)
    data = session.draw(3, 99)
    seen = []
    step = TrajectoryDistillation(window=window, step_order="sampler")
    for index in step._windows(data, 0):
        steps, images = data.timestep[index], data.trajectory[index]
        count = len(index) // 3
        assert torch.equal(images.view(count, 3), torch.arange(3).expand(count, 3))
        rows = [data.timesteps.tolist().index(step) for step in steps.view(count, 3)[:, 0].tolist()]
        assert rows == list(range(rows[0], rows[0] + count))
        seen += rows
    assert seen == list(range(5))


def test_mixed_order_trains_on_each_window_once_in_another_order(tiny_session):
    session = ready(tiny_session)
    data = session.draw(2, 99)
    step = TrajectoryDistillation(step_order="mixed")
    orders = [
        [float(data.timestep[index][0]) for index in step._windows(data, seed)] for seed in (1, 2)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(data.timesteps.tolist())
    assert orders[0] != orders[1]


@pytest.mark.parametrize("window", [1, 2])
def test_shuffled_order_trains_on_every_input_once_with_steps_mixed(window, tiny_session):
    session = ready(tiny_session)
    data = session.draw(2, 99)
    step = TrajectoryDistillation(batch=2, window=window, step_order="shuffled")
    windows = list(step._windows(data, 1))
    assert [len(index) for index in windows[:-1]] == [2 * window] * (len(windows) - 1)
    assert len(windows) == -(-5 // window)  # as many updates as in the other orders
    assert torch.equal(torch.cat(windows).sort().values, torch.arange(len(data)))
    assert any(len(data.timestep[index].unique()) > window for index in windows)


def test_with_guidance_there_are_as_many_updates_of_twice_the_inputs(tiny_session):
    session = ready(tiny_session)
    data = session.draw(2, 99)
    guided = data.take(torch.arange(len(data)).repeat_interleave(2))
    for order in ("shuffled", "mixed"):
        step = TrajectoryDistillation(batch=2, window=2, step_order=order)
        sizes = [len(index) for index in step._windows(guided, 1)]
        assert sorted(sizes, reverse=True) == [8, 8, 4], order


def test_every_round_draws_other_images_than_calibration(tiny_session):
    session = ready(tiny_session)
    seeds = []
    draw = session.draw

    def watch(num, seed, denoiser=None):
        seeds.append((num, seed, denoiser))
        return draw(num, seed, denoiser)

    session.draw = watch
    TrajectoryDistillation(**TINY).apply(session)
    assert seeds == [(2, 3_000_000 + 2 * number, None) for number in range(4)]


def test_the_last_share_of_rounds_is_drawn_by_the_quantized_model(tiny_session):
    session = ready(tiny_session)
    drawn = []
    draw = session.draw

    def watch(num, seed, denoiser=None):
        drawn.append((seed, denoiser))
        return draw(num, seed, denoiser)

    session.draw = watch
    TrajectoryDistillation(**TINY, self_sampled=0.5).apply(session)
    trained = [denoiser for seed, denoiser in drawn if seed >= 3_000_000]
    held_out = [denoiser for seed, denoiser in drawn if seed == 2_000_000]
    assert trained == [None, None, session.model, session.model]
    assert held_out == [session.model] * 3  # before, and after each of its rounds
    summary = session.summary["trajectory_distillation"]
    assert summary["self_sampled_from"] == 3  # before, and after two rounds on float trajectories
    assert len(summary["losses"]) == 6
    assert summary["loss_after"] == min(summary["losses"][3:])


def test_self_sampled_trajectories_are_those_of_the_quantized_model(tiny_session):
    session = ready(tiny_session, weights=2, activations=4)
    ours, theirs = session.draw(1, 5, session.model), session.draw(1, 5)
    assert torch.equal(ours.sample[0], theirs.sample[0])  # the same noise
    assert not torch.allclose(ours.sample[-1], theirs.sample[-1], atol=1e-3)


def test_a_loss_that_is_not_finite_names_step_and_timestep(tiny_session):
    session = ready(tiny_session)
    draw = session.draw

    def poisoned(num, seed, denoiser=None):
        data = draw(num, seed, denoiser)
        data.sample[data.timestep == data.timesteps[2]] = float("nan")
        return data

    session.draw = poisoned
    step = session.trajectories.timesteps[2].item()
    with pytest.raises(
        StepQuantError, match=f"loss is nan at timestep {step:g} in step 'trajectory_distillation'"
    ):
        TrajectoryDistillation(**TINY).apply(session)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("rounds", "adapters", "self_sampled"),
    [(1, False, 0.0), (3, True, 0.0), (1, True, 0.5), (2, False, 0.5), (3, True, 0.5)],
)
def test_after_a_kill_it_ends_with_the_same_bits(
    rounds, adapters, self_sampled, tiny_session, tmp_path, one_thread, monkeypatch
):
    monkeypatch.setattr("stepquant.methods.trajectory_distillation.SECONDS_BETWEEN_SAVES", 0.0)
    tiny = {**TINY, "self_sampled": self_sampled}

    def session_on(work):
        session = ready(tiny_session, work=work)
        if adapters:
            LowRankAdapters(rank=2).apply(session)
        return session

    whole = session_on(None)
    TrajectoryDistillation(**tiny).apply(whole)

    killed = session_on(WorkFolder(tmp_path / "work", {}, False))
    draw, drawn = killed.draw, []

    def deadly(num, seed, denoiser=None):
        if len(drawn) == rounds:
            raise Killed
        if seed >= 3_000_000:  # not what is held out
            drawn.append(seed)
        return draw(num, seed, denoiser)

    killed.draw = deadly
    with pytest.raises(Killed):
        TrajectoryDistillation(**tiny).apply(killed)

    resumed = session_on(WorkFolder(tmp_path / "work", {}, True))
    TrajectoryDistillation(**tiny).apply(resumed)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert resumed.summary["trajectory_distillation"] == whole.summary["trajectory_distillation"]


def test_a_finished_one_is_taken_from_the_work_folder(tiny_session, tmp_path, one_thread):
    first = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, False))
    TrajectoryDistillation(**TINY).apply(first)
    again = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, True))

    def never(num, seed, denoiser=None):
        raise AssertionError("nothing is to be drawn")

    again.draw = never
    TrajectoryDistillation(**TINY).apply(again)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
