from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from architectures import session as session_of
from quantize_runs import Lines, refused
from stepquant.calibration.influence import shared_power, weighted_power
from stepquant.calibration.trajectories import predict
from stepquant.engines.backend import set_backend
from stepquant.methods import AffineDistillation, TemporalQuantizer
from stepquant.methods.affine_distillation import affine_parameters, only_gradients_of
from stepquant.methods.training.steps_together import coherent_inputs
from stepquant.simulation.packing import pack_model
from stepquant.support.work_folder import WorkFolder

TINY = {"iterations": 12, "batch": 6, "samples": 30, "steps_together": 3, "rate": 1e-3}


def ready(tiny_session, **options):
    session = tiny_session(**{"weights": 3, "activations": 4, "steps": 5, "num": 6, **options})
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    return session


def test_shared_power_against_the_transform_written_out():
    generator = torch.Generator().manual_seed(3)
    error = torch.randn(6, 2, 4, 4, generator=generator)
    spectrum = torch.rand(6, 4, 4, generator=generator)
    k = np.arange(4)
    F = np.exp(-2j * np.pi * np.outer(k, k) / 4) / 2
    total = 0.0
    for group in range(2):
        for channel in range(2):
            mean = 0
            for member in range(3):
                e = error[3 * group + member, channel].double().numpy()
                weight = spectrum[3 * group + member].double().numpy()
                mean = mean + np.sqrt(weight) * (F @ e @ F.T) / 3
            total += (np.abs(mean) ** 2).mean() / 4
    assert float(shared_power(error, spectrum, 3)) == pytest.approx(total, rel=1e-5)
    alone = weighted_power(error, spectrum).mean()
    assert float(shared_power(error, spectrum, 1)) == pytest.approx(float(alone), rel=1e-5)


def test_what_steps_have_in_common_stays_and_what_cancels_goes():
    even = torch.ones(4, 1, 2, 2)
    spectrum = torch.ones(4, 2, 2)
    assert float(shared_power(even, spectrum, 2)) == pytest.approx(1.0)
    against = even * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(4, 1, 1, 1)
    assert float(shared_power(against, spectrum, 2)) == pytest.approx(0.0, abs=1e-12)


def test_the_loss_falls_and_only_biases_and_norms_change(tiny_session):
    session = ready(tiny_session)
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    flags = {name: value.requires_grad for name, value in session.model.named_parameters()}
    AffineDistillation(**TINY).apply(session)
    summary = session.summary["affine_distillation"]
    assert summary["loss_after"] < 0.9 * summary["loss_before"]
    assert summary["losses"][0] == summary["loss_before"]
    norms = {
        f"{name}.{which}"
        for name, module in session.model.named_modules()
        if isinstance(module, torch.nn.GroupNorm)
        for which in ("weight", "bias")
    }
    biases = {f"{name}.bias" for name in session.layers()}
    after = session.model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert norms and changed and changed <= norms | biases
    assert {"conv_in.bias", "conv_out.bias"} <= changed
    assert flags == {n: value.requires_grad for n, value in session.model.named_parameters()}
    assert all(value.grad is None for value in session.model.parameters())
    expected = sum(after[key].numel() for key in norms | biases)
    assert summary["values"] == expected


def test_the_loss_is_the_weighted_error_of_held_out_trajectories(tiny_session):
    """All five steps together, one trajectory held out: nothing is left to chance."""
    session = ready(tiny_session)
    before = copy.deepcopy(session.model)
    AffineDistillation(**{**TINY, "batch": 5, "steps_together": 5}).apply(session)
    data = coherent_inputs(session.trajectories, 30, 5, "x", 0).take(slice(25, 30))
    spectrum = session.influence(1.0).double().numpy()  # a row for each step, in the grid's order
    with torch.no_grad():
        target = predict(session.float_model, data)

    def loss(model):
        with torch.no_grad():
            error = (predict(model, data) - target).double().numpy()
        parts = np.fft.fft2(error, norm="ortho") * np.sqrt(spectrum)[:, None]
        alone = np.fft.fft2(target.double().numpy(), norm="ortho") * np.sqrt(spectrum)[:, None]
        return (np.abs(parts.mean(axis=0)) ** 2).mean() / (np.abs(alone) ** 2).mean()

    summary = session.summary["affine_distillation"]
    session.context.attach(before)
    assert summary["loss_before"] == pytest.approx(loss(before), rel=1e-3)
    assert summary["loss_after"] == pytest.approx(loss(session.model), rel=1e-3)


def test_the_packed_model_is_the_trained_one(tiny_session):
    session = ready(tiny_session, attention=8)
    AffineDistillation(**TINY).apply(session)
    data = session.trajectories
    with torch.no_grad():
        expected = predict(session.model, data)
        packed = pack_model(copy.deepcopy(session.model))
        set_backend(packed, "reference")
        found = predict(packed, data)
    assert torch.equal(found, expected)


def test_a_killed_training_goes_on_as_if_nothing_had_happened(tiny_session, tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.methods.affine_distillation.SECONDS_BETWEEN_SAVES", 0.0)
    whole = ready(tiny_session)
    AffineDistillation(**TINY).apply(whole)

    killed = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, False))
    losses = AffineDistillation._loss
    calls = []

    def deadly(*args):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(AffineDistillation, "_loss", deadly)
        with pytest.raises(KeyboardInterrupt):
            AffineDistillation(**TINY).apply(killed)
    assert all(value.grad is None for value in killed.model.parameters())

    resumed = ready(tiny_session, work=WorkFolder(tmp_path / "work", {}, True))
    AffineDistillation(**TINY).apply(resumed)
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    assert resumed.summary["affine_distillation"] == whole.summary["affine_distillation"]


def test_with_guidance_the_loss_is_of_the_mixed_prediction(one_thread):
    """Both steps together, one of two images held out: nothing is left to chance."""
    session = session_of("dit", 3, 4, steps=2)
    session.scheduler.set_timesteps(2)
    session.ensure_ranges()
    before = copy.deepcopy(session.model)
    options = {"iterations": 8, "batch": 4, "samples": 16, "steps_together": 2, "rate": 1e-3}
    AffineDistillation(**options).apply(session)
    held_out = session.trajectories.take(session.trajectories.trajectory == 1)
    assert (
        held_out.timestep.unique_consecutive().tolist() == session.trajectories.timesteps.tolist()
    )
    spectrum = session.influence(1.0).double().numpy()[:, None]  # [T, 1, H, W]

    def mix(model):
        with torch.no_grad():
            conditional, without = predict(model, held_out)[:, :4].unflatten(0, (2, 2)).unbind(1)
        return (without + 4 * (conditional - without)).double().numpy()  # the pipeline's scale

    def loss(model):
        error = np.fft.fft2(mix(model) - target, norm="ortho") * np.sqrt(spectrum)
        alone = np.fft.fft2(target, norm="ortho") * np.sqrt(spectrum)
        return (np.abs(error.mean(axis=0)) ** 2).mean() / (np.abs(alone) ** 2).mean()

    target = mix(session.float_model)
    summary = session.summary["affine_distillation"]
    session.context.attach(before)
    assert summary["loss_before"] == pytest.approx(loss(before), rel=1e-3)
    session.context.attach(session.model)
    assert summary["loss_after"] == pytest.approx(loss(session.model), rel=1e-3)
    assert summary["loss_after"] <= summary["loss_before"]


def test_a_mix_that_changes_from_step_to_step_is_not_followed():
    current = session_of("sd")
    current.scheduler.set_timesteps(3)
    current.trajectories.sample[
        current.trajectories.timestep == current.trajectories.timesteps[1]
    ] *= 2
    current.ensure_ranges()
    AffineDistillation(**TINY).apply(current)
    why = current.summary["affine_distillation"]["nothing_because"]
    assert why.startswith("the sampler mixes several predictions of an image at each step")


def through_ddpm(current):
    current.scheduler = DDPMScheduler.from_config(current.scheduler.config)


@pytest.mark.parametrize(
    ("name", "change", "because"),
    [
        ("sd", through_ddpm, "mixes several predictions"),
        ("flux", lambda _: None, "DDIM and DDPM only"),
    ],
    ids=["guidance and noise", "flow"],
)
def test_where_the_influence_cannot_be_followed_nothing_changes_and_it_says_so(
    name, change, because
):
    current = session_of(name)
    change(current)
    current.ensure_ranges()
    current.reporter = Lines()
    before = {key: value.clone() for key, value in current.model.state_dict().items()}
    AffineDistillation(**TINY).apply(current)
    assert because in current.summary["affine_distillation"]["nothing_because"]
    assert because in current.reporter.lines[0]
    after = current.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_where_nothing_is_float_nothing_changes_and_it_says_so(tiny_session):
    session = ready(tiny_session)
    for layer in session.layers().values():
        layer.bias = None
    for module in session.model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight = module.bias = None
    assert affine_parameters(session) == []
    AffineDistillation(**TINY).apply(session)
    why = session.summary["affine_distillation"]["nothing_because"]
    assert why == "no quantized layer has a bias, and there is no norm with gains"


def test_norms_that_share_their_gains_count_once(tiny_session):
    session = ready(tiny_session)
    norms = [m for m in session.model.modules() if isinstance(m, torch.nn.GroupNorm)]
    before = len(affine_parameters(session))
    same = next(m for m in norms[1:] if m.weight.shape == norms[0].weight.shape)
    same.weight = norms[0].weight
    assert len(affine_parameters(session)) == before - 1


@pytest.mark.parametrize(
    ("changes", "checks"),
    [
        ({"batch": 7}, 9),  # two trajectories of three steps
        ({"batch": 8, "steps_together": 8}, 9),  # of a sampler that has five
        ({"iterations": 0}, 1),
    ],
    ids=["not a multiple", "more than all", "none"],
)
def test_odd_sizes_of_batches_and_trainings(tiny_session, changes, checks):
    session = ready(tiny_session)
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    AffineDistillation(**{**TINY, "iterations": 8, **changes}).apply(session)
    losses = session.summary["affine_distillation"]["losses"]
    assert len(losses) == checks and bool(torch.tensor(losses).isfinite().all())
    after = session.model.state_dict()
    same = all(torch.equal(value, before[key]) for key, value in after.items())
    assert same == (min(losses) == losses[0])


def test_a_predicted_variance_does_not_count(tiny_session, monkeypatch):
    session = ready(tiny_session)
    step = AffineDistillation(**TINY)
    inputs = session.trajectories.take(slice(0, 3))
    expected = float(step._loss(session, inputs, 3, torch.ones(1)).detach())

    def with_variance(model, data):
        noise = predict(model, data)
        return torch.cat([noise, noise + (model is session.model)], dim=1)

    monkeypatch.setattr("stepquant.methods.affine_distillation.predict", with_variance)
    assert float(step._loss(session, inputs, 3, torch.ones(1)).detach()) == pytest.approx(
        expected, rel=1e-6
    )


def test_bad_settings_and_losses_are_named(tiny_session):
    session = ready(tiny_session)
    assert "expected a finite number" in refused(
        lambda: AffineDistillation(**{**TINY, "rate": 1e30}).apply(session)
    )
    few = AffineDistillation(batch=2, steps_together=8)
    assert "steps_together 8 and batches of 2" in refused(lambda: few.check(None))


def test_gradients_are_asked_of_the_named_parameters_only(tiny_session):
    session = ready(tiny_session)
    chosen = affine_parameters(session)
    data = session.trajectories.take(slice(0, 2))
    with only_gradients_of(session.model, chosen):
        predict(session.model, data).square().mean().backward()
        found = [value for value in session.model.parameters() if value.grad is not None]
        assert 0 < len(found) <= len(chosen)
        assert {id(value) for value in found} <= {id(value) for value in chosen}
