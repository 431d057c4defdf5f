from __future__ import annotations

import pytest
import torch

from stepquant.methods import TemporalQuantizer
from stepquant.support.errors import StepQuantError
from stepquant.support.work_folder import WorkFolder


@torch.no_grad()
def output(model, timestep=400):
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(x, torch.as_tensor(timestep)).sample


def test_ranges_are_made_once(tiny_session, monkeypatch):
    session = tiny_session()
    calls = []
    monkeypatch.setattr(
        "stepquant.methods.session.initialize_ranges", lambda *args: calls.append(args[2:6])
    )
    session.ensure_ranges()
    session.ensure_ranges()
    assert calls == [("minmax", "minmax", 0, session.samples_per_step)]
    assert session.ranges_ready


def test_ranges_quantize_every_layer(tiny_session):
    session = tiny_session(weights=4, activations=4)
    before = output(session.model)
    assert not any(layer.quantizing for layer in session.layers().values())
    session.require_no_ranges("any")
    session.ensure_ranges()
    assert all(layer.quantizing for layer in session.layers().values())
    after = output(session.model)
    assert not torch.allclose(before, after, rtol=0.01, atol=0.01)
    with pytest.raises(StepQuantError, match="step 'any' comes after one that needs ranges"):
        session.require_no_ranges("any")


def test_kept_ranges_are_taken_up_bit_by_bit(tiny_session, tmp_path, monkeypatch):
    def session(resume):
        made = tiny_session(work=WorkFolder(tmp_path / "work", {"a": 1}, resume))
        TemporalQuantizer().apply(made)
        made.layers()["conv_out"].multiply_channel_scale(torch.linspace(0.5, 2, 16))
        return made

    first = session(False)
    first.ensure_ranges()
    monkeypatch.setattr("stepquant.methods.session.initialize_ranges", None)  # must not be called
    again = session(True)
    again.ensure_ranges()
    assert again.ranges_ready
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert torch.equal(output(again.model), output(first.model))


def test_image_gradients_are_measured_once_and_kept(tiny_session, tmp_path, monkeypatch):
    session = tiny_session(steps=4, work=WorkFolder(tmp_path / "work", {}, False))
    found = session.image_gradients()
    assert found.shape == (4, 2, 1, 16, 16)
    again = tiny_session(steps=4, work=WorkFolder(tmp_path / "work", {}, True))
    monkeypatch.setattr("stepquant.methods.session.image_gradients", None)
    assert torch.equal(session.image_gradients(), found)
    assert torch.equal(again.image_gradients(), found)


def test_influence_is_one_in_the_mean_and_more_even_at_a_lower_exponent(tiny_session):
    session = tiny_session(steps=5)
    spread = []
    for exponent in (1.0, 0.5):
        weights = session.influence(exponent)
        assert weights.shape == (5, 16, 16)
        assert float(weights.mean()) == pytest.approx(1)
        assert (weights > 0).all()
        spread.append(float(weights.max() / weights.min()))
    assert spread[1] == pytest.approx(spread[0] ** 0.5, rel=1e-3)
    assert all(parameter.grad is None for parameter in session.float_model.parameters())
