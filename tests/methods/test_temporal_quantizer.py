from __future__ import annotations

import pytest
import torch

from stepquant.calibration.observe import observe
from stepquant.methods import TemporalQuantizer
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter


@pytest.fixture(scope="module")
def session(tiny_session):
    """After TPQ and min-max ranges: four steps, eight bits."""
    session = tiny_session(weights=8, activations=8, steps=4)
    session.expected = observe(session.model, session.trajectories, 2, 0, Reporter(quiet=True))
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    return session


def test_every_activation_gets_a_row_for_each_step(session):
    assert session.summary["temporal_quantizer"] == {"steps": 4}
    for layer in session.layers().values():
        for quantizer in layer.activation_quantizers:
            assert quantizer.steps == len(quantizer.zero_point) == 4


def test_weights_have_no_table(session):
    for layer in session.layers().values():
        for quantizer in layer.weight_quantizers:
            assert len(quantizer.scale) == layer.out_channels


def test_each_row_covers_what_its_own_step_shows(session):
    for (name, part), seen in session.expected.items():
        quantizer = session.layers()[name].activation_quantizers[part]
        scale, zero = quantizer.scale.detach(), quantizer.zero_point.detach()
        low = torch.stack([values.amin() for values in seen.low]).clamp(max=0)
        high = torch.stack([values.amax() for values in seen.high]).clamp(min=0)
        torch.testing.assert_close(scale * 255, high - low, rtol=1e-4, atol=1e-6)
        assert (-scale * zero <= low + scale).all()
        assert (scale * (255 - zero) >= high - scale).all()


def test_rows_differ_where_the_steps_differ(session):
    scales = session.layers()["conv_in"].activation_quantizers[0].scale
    assert len(scales.unique()) == 4


def test_a_batch_of_mixed_steps_is_what_each_step_gives_alone(session):
    data = session.trajectories
    with torch.no_grad():
        together = session.model(data.sample, data.timestep).sample
        for row, timestep in enumerate(data.timesteps):
            alone = session.model(data.step(row).sample, timestep).sample
            torch.testing.assert_close(
                together[data.timestep == timestep], alone, rtol=1e-4, atol=1e-4
            )


def test_without_it_one_row_serves_all_steps(tiny_session):
    session = tiny_session()
    session.ensure_ranges()
    assert {
        q.steps for layer in session.layers().values() for q in layer.activation_quantizers
    } == {1}


def test_it_comes_before_the_ranges(tiny_session):
    session = tiny_session()
    session.ensure_ranges()
    with pytest.raises(StepQuantError, match="step 'temporal_quantizer' comes after one that"):
        TemporalQuantizer().apply(session)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_rows_may_start_from_the_range_of_all_steps(method, tiny_session):
    def tables(*steps):
        session = tiny_session(weights=4, activations=4, steps=4)
        session.activation_ranges = method
        for step in steps:
            step.apply(session)
        session.ensure_ranges()
        return {
            (name, index): (quantizer.scale.detach(), quantizer.zero_point.detach())
            for name, layer in session.layers().items()
            for index, quantizer in enumerate(layer.activation_quantizers)
        }

    static, common = tables(), tables(TemporalQuantizer(start="common"))
    assert static.keys() == common.keys()
    for key, pair in common.items():
        for table, single in zip(pair, static[key], strict=True):
            assert len(table) == 4 and len(single) == 1
            assert torch.equal(table, single.expand(4))
