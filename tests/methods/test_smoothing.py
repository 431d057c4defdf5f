from __future__ import annotations

import pytest
import torch

from stepquant.methods import Smoothing, WeightDilation
from stepquant.methods.smoothing import smoothing_factors
from stepquant.support.errors import StepQuantError

W = torch.tensor([[4.0, -0.5, 0.0], [-1.0, 0.25, 0.0]])
X_MAX = torch.tensor([16.0, 9.0, 2.0])


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.5, [16**0.5 / 4**0.5, 9**0.5 / 0.5**0.5, 1.0]),
        (0.0, [1 / 4, 1 / 0.5, 1.0]),
        (1.0, [16.0, 9.0, 1.0]),
        (0.25, [16**0.25 / 4**0.75, 9**0.25 / 0.5**0.75, 1.0]),
    ],
)
def test_factors_by_hand(alpha, expected):
    assert smoothing_factors(W, X_MAX, alpha).tolist() == pytest.approx(expected)


def test_a_conv_takes_the_largest_of_all_taps():
    taps = torch.zeros(2, 3, 1, 2)
    taps[:, :, 0, 1] = W
    taps[0, 1, 0, 0] = -2.0
    expected = [2.0, 9**0.5 / 2**0.5, 1.0]
    assert smoothing_factors(taps, X_MAX, 0.5).tolist() == pytest.approx(expected)


def test_a_channel_without_activation_keeps_its_weight():
    assert smoothing_factors(W, torch.tensor([16.0, 0.0, 0.0]), 0.5).tolist() == [2.0, 1.0, 1.0]


def test_half_balances_activation_and_weight():
    s = smoothing_factors(W[:, :2], X_MAX[:2], 0.5)
    torch.testing.assert_close(X_MAX[:2] / s, W[:, :2].abs().amax(dim=0) * s)


@pytest.fixture(scope="module")
def applied(tiny_session):
    session = tiny_session()
    Smoothing().apply(session)
    return session


@torch.no_grad()
def difference(session):
    data = session.trajectories
    expected = session.float_model(data.sample, data.timestep).sample
    found = session.model(data.sample, data.timestep).sample
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_function_is_unchanged(applied):
    assert difference(applied) <= 1e-4


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_function_is_unchanged_at_the_ends_of_alpha(tiny_session, alpha):
    session = tiny_session()
    Smoothing(alpha=alpha).apply(session)
    assert difference(session) <= 1e-4


def test_activations_and_weights_balance_in_every_layer(applied):
    """At alpha 1/2 the largest input of a channel equals the largest weight that it meets."""
    session = applied
    largest = {}

    def look(name, layer, args):
        largest[name] = layer.scaled_input(args[0])

    names = ["conv_in", "down_blocks.0.resnets.0.conv1", "conv_out", "time_embedding.linear_2"]
    handles = [
        session.layers()[name].register_forward_pre_hook(
            lambda layer, args, name=name: look(name, layer, args)
        )
        for name in names
    ]
    data = session.trajectories
    with torch.no_grad():
        session.model(data.sample, data.timestep)
    for handle in handles:
        handle.remove()
    for name in names:
        layer = session.layers()[name]
        x = largest[name].movedim(layer.channel_dim, 0).flatten(1).abs().amax(dim=1)
        w = layer.weight.detach().transpose(0, 1).flatten(1).abs().amax(dim=1)
        torch.testing.assert_close(x, w, rtol=1e-3, atol=1e-6)


def test_unlike_dilation_it_changes_weight_ranges(applied):
    name = "down_blocks.0.resnets.0.conv1"
    before = applied.float_model.get_submodule(name).weight.flatten(1).amax(dim=1)
    after = applied.layers()[name].weight.flatten(1).amax(dim=1)
    assert not torch.isclose(before, after, rtol=0.01).any()
    records = applied.summary["smoothing"]
    assert len({(r["layer"], r["part"]) for r in records}) == len(records) == 50 - 4 * 2 + 8


def test_it_combines_with_dilation(tiny_session):
    session = tiny_session()
    Smoothing().apply(session)
    WeightDilation().apply(session)
    assert difference(session) <= 1e-4


@pytest.mark.parametrize("step", [Smoothing, WeightDilation])
def test_without_folding_each_layer_divides_its_own_input(tiny_session, step):
    session = tiny_session()
    step(fold=False).apply(session)
    assert difference(session) <= 1e-4
    assert not any(record["folded"] for record in session.summary[step.name])
    for name, module in session.float_model.named_modules():
        scaled = session.model.get_submodule(name)
        if isinstance(module, torch.nn.GroupNorm):
            assert torch.equal(scaled.weight, module.weight)
    values = "mid_block.attentions.0.to_v"  # its rows are divided where scalings are folded
    layer = session.layers()[values]
    weight = layer.weight * layer.inverse_channel_scale
    torch.testing.assert_close(weight, session.float_model.get_submodule(values).weight)


def test_it_comes_before_the_ranges(tiny_session):
    session = tiny_session()
    session.ensure_ranges()
    with pytest.raises(StepQuantError, match="step 'smoothing' comes after one that needs ranges"):
        Smoothing().apply(session)
