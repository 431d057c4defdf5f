from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.calibration.observe import observe
from stepquant.methods import WeightDilation
from stepquant.methods.equivalent_scaling import input_range
from stepquant.methods.weight_dilation import dilation_factors
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

GROUP = ("to_q", "to_k", "to_v")


def by_brute_force(W: torch.Tensor, max_factor: float) -> list[float]:
    """METHODS 1.2, one weight after another in Python's floats (float64)."""
    rows = W.flatten(2).tolist() if W.dim() > 2 else W.unsqueeze(2).tolist()
    factors = []
    for k in range(W.shape[1]):
        s = math.inf
        for row in rows:
            high = max(0.0, max(w for channel in row for w in channel))
            low = min(0.0, min(w for channel in row for w in channel))
            for w in row[k]:
                if w > 0:
                    s = min(s, high / w)
                elif w < 0:
                    s = min(s, low / w)
        factors.append(1.0 if s == math.inf else min(max(s, 1.0), max_factor))
    return factors


def extremes(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the affine grid of each out-channel has to cover, with zero."""
    flat = W.flatten(1)
    return flat.amin(dim=1).clamp(max=0), flat.amax(dim=1).clamp(min=0)


def dilated(W: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return W * s.view(1, -1, *(1,) * (W.dim() - 2))


def weight(shape: tuple[int, ...], seed: int, zeros: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    W *= (torch.randn(shape[1], generator=generator)).exp().view(1, -1, *(1,) * (len(shape) - 2))
    return torch.where(torch.rand(shape, generator=generator) < zeros, 0.0, W)


def test_a_case_worked_by_hand():
    W = torch.tensor([[1.0, 0.5, -0.25, 0.0], [-2.0, 0.1, 1.0, 0.0]])
    # Out-channel 0 spans [-0.25, 1], out-channel 1 [-2, 1].
    # k=0 attains 1 and -2; k=1: min(1 / 0.5, 1 / 0.1) = 2; k=2 attains -0.25 and 1; k=3 is zero.
    assert dilation_factors(W, 100.0).tolist() == [1.0, 2.0, 1.0, 1.0]


def test_taps_of_a_conv_share_the_factor_of_their_in_channel():
    W = torch.zeros(1, 2, 1, 3)
    W[0, 0, 0] = torch.tensor([4.0, -4.0, 0.0])
    W[0, 1, 0] = torch.tensor([0.5, -1.0, 0.25])
    assert dilation_factors(W, 100.0).tolist() == [1.0, 4.0]


def test_a_weight_of_the_other_sign_does_not_bound_the_factor():
    """As printed, -2 / relu(-0.5) and 1 / min(0.5, 0) divide by zero; the ratio is masked."""
    W = torch.tensor([[4.0, -0.5, 0.5], [1.0, 0.0, 0.0], [-3.0, 0.0, 0.0]])
    assert dilation_factors(W, 100.0).tolist() == [1.0, 1.0, 8.0]


def test_zero_belongs_to_the_range_of_an_out_channel():
    """All weights of the channel are positive: the grid covers [0, 3], the factor is 3."""
    assert dilation_factors(torch.tensor([[3.0, 1.0]]), 100.0).tolist() == [1.0, 3.0]
    assert dilation_factors(torch.tensor([[-3.0, -1.0]]), 100.0).tolist() == [1.0, 3.0]


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1, 1), (1, 2, 3, 3)])
def test_an_in_channel_of_zeros_gets_one(shape):
    W = weight(shape, 0)
    W[:, 1] = 0.0
    assert dilation_factors(W, 100.0)[1] == 1.0
    assert dilation_factors(torch.zeros(shape), 100.0).tolist() == [1.0] * shape[1]


@pytest.mark.parametrize("max_factor", [1.0, 1.5, 100.0])
def test_factors_stop_at_the_cap(max_factor):
    W = torch.tensor([[1.0, 1e-6, 0.9, 1e-41]])
    found = dilation_factors(W, max_factor).tolist()
    assert found == pytest.approx([1.0, max_factor, min(max_factor, 1 / 0.9), max_factor])


@pytest.mark.parametrize(
    "shape", [(4, 3), (3, 8), (16, 4), (2, 6, 1, 1), (3, 5, 3, 3), (1, 7, 2, 3)], ids=str
)
@pytest.mark.parametrize("zeros", [0.0, 0.6], ids=["dense", "sparse"])
def test_factors_are_those_of_a_brute_force_search(shape, zeros):
    for seed in range(3):
        W = weight(shape, seed, zeros)
        found = dilation_factors(W, 10.0)
        assert found.shape == (shape[1],)
        assert found.tolist() == pytest.approx(by_brute_force(W, 10.0), rel=1e-6)


@st.composite
def weights(draw):
    """Any finite float32 weight, conv or linear, zeros and subnormal numbers among it."""
    shape = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 4))
        | st.tuples(st.integers(1, 2), st.integers(1, 3), st.just(1), st.integers(1, 3))
    )
    numbers = st.floats(-1e6, 1e6, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 3.0])
    count = math.prod(shape)
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).view(shape)


@settings(max_examples=60)
@given(weights(), st.sampled_from([1.0, 2.5, 100.0]))
def test_the_range_of_every_out_channel_stays_bitwise(W, max_factor):
    s = dilation_factors(W, max_factor)
    assert (s >= 1).all()
    assert (s <= max_factor).all()
    for before, after in zip(extremes(W), extremes(dilated(W, s)), strict=True):
        assert torch.equal(before, after)


@settings(max_examples=40)
@given(weights())
def test_random_weights_agree_with_the_brute_force_search(W):
    assert dilation_factors(W, 50.0).tolist() == pytest.approx(by_brute_force(W, 50.0), rel=1e-6)


@settings(max_examples=40)
@given(weights())
def test_a_second_dilation_changes_nothing(W):
    once = dilated(W, dilation_factors(W, 1e6))
    again = dilation_factors(once, 1e6)
    # An in-channel at the cap may have further to go; all others touch an extreme now.
    free = dilation_factors(W, 1e6) < 1e6
    torch.testing.assert_close(again[free], torch.ones_like(again[free]), rtol=1e-6, atol=0)


# On a real (tiny) UNet.


@pytest.fixture(scope="module")
def applied(tiny_session):
    """A session after Weight Dilation, and what was seen of the activations before it."""
    session = tiny_session()
    before = observe(session.model, session.trajectories, 8, 0, Reporter(quiet=True))
    WeightDilation().apply(session)
    return session, before


def float_weight(session, name):
    return session.float_model.get_submodule(name).weight.detach()


def parts(session, name, W):
    return W.split(session.layers()[name].splits, dim=1)


def folded(session):
    """Consumer -> (producer, all its consumers)."""
    return {
        consumer: (producer, consumers)
        for producer, consumers in session.adapter.folds(session.float_model)
        for consumer in consumers
    }


def expected_factors(session, name):
    """Factors of the layer's input, from the float weights of all who share that input."""
    _, group = folded(session).get(name, (None, (name,)))
    split = [parts(session, member, float_weight(session, member)) for member in group]
    return torch.cat(
        [dilation_factors(torch.cat(part), 100.0) for part in zip(*split, strict=True)]
    )


def test_the_float_output_is_unchanged(applied):
    session, _ = applied
    data = session.trajectories
    with torch.no_grad():
        expected = session.float_model(data.sample, data.timestep).sample
        found = session.model(data.sample, data.timestep).sample
    assert not any(layer.quantizing for layer in session.layers().values())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_range_of_every_out_channel_of_every_layer_stays_bitwise(applied):
    session, _ = applied
    values = {producer: consumers for producer, consumers in session.adapter.folds(session.model)}
    for name, layer in session.layers().items():
        before = parts(session, name, float_weight(session, name))
        for old, new in zip(before, layer.weight_parts(), strict=True):
            low, high = extremes(old)
            if name in values:  # its rows were divided by the factors of its only consumer
                s = expected_factors(session, values[name][0])
                low, high = low / s, high / s
            assert torch.equal(extremes(new.detach())[0], low), name
            assert torch.equal(extremes(new.detach())[1], high), name


def test_weights_are_dilated_by_the_factors_of_their_input(applied):
    session, _ = applied
    rows = {p: session.model.get_submodule(p) for p, _ in session.adapter.folds(session.model)}
    for name, layer in session.layers().items():
        if name not in rows:
            expected = dilated(float_weight(session, name), expected_factors(session, name))
            assert torch.equal(layer.weight.detach(), expected), name


def test_factors_are_folded_exactly_where_the_adapter_says(applied):
    session, _ = applied
    folds = folded(session)
    assert len(folds) == 4 * 4  # q, k, v and the output of four attentions
    for name, layer in session.layers().items():
        factors = expected_factors(session, name)
        if name in folds:
            assert not layer.scales_input, name
        else:
            torch.testing.assert_close(layer.inverse_channel_scale, 1 / factors)
            assert layer.scales_input == bool((factors != 1).any()), name


def test_a_norm_and_a_value_projection_take_up_the_inverse_factors(applied):
    session, _ = applied
    dilated_producers = 0
    for producer, consumers in session.adapter.folds(session.model):
        s = expected_factors(session, consumers[0])
        dilated_producers += bool((s > 1).any())
        old, new = (m.get_submodule(producer) for m in (session.float_model, session.model))
        torch.testing.assert_close(new.bias.detach(), old.bias.detach() / s)
        if producer.endswith("group_norm"):
            torch.testing.assert_close(new.weight.detach(), old.weight.detach() / s)
    assert dilated_producers >= 4  # or this shows little


def test_the_float_model_is_left_alone(applied, tiny_unet):
    session, _ = applied
    for name, value in tiny_unet().state_dict().items():
        assert torch.equal(session.float_model.state_dict()[name], value), name


def test_the_summary_has_each_input_once(applied):
    session, _ = applied
    records = session.summary["weight_dilation"]
    seen = [(name, r["part"]) for r in records for name in r["layer"].split("+")]
    assert len(seen) == len(set(seen))
    assert set(seen) == {
        (name, part)
        for name, layer in session.layers().items()
        for part in range(len(layer.splits))
    }
    together = [r["layer"] for r in records if "+" in r["layer"]]
    assert len(together) == 4
    for names in together:
        assert tuple(name.rpartition(".")[2] for name in names.split("+")) == GROUP
    folds = folded(session)
    assert all(r["folded"] == (r["layer"].split("+")[0] in folds) for r in records)


def test_the_summary_tells_the_factors(applied):
    session, _ = applied
    for record in session.summary["weight_dilation"]:
        name = record["layer"].split("+")[0]
        splits = session.layers()[name].splits
        factors = expected_factors(session, name).split(splits)[record["part"]]
        assert record["scaled_share"] == pytest.approx(float((factors > 1).float().mean()))
        assert record["median_factor"] == pytest.approx(float(factors.median()))


def test_the_summary_tells_the_ranges_that_are_seen_before_and_after(applied):
    session, before = applied
    after = observe(session.model, session.trajectories, 8, 0, Reporter(quiet=True))
    shrunk = 0
    for record in session.summary["weight_dilation"]:
        key = (record["layer"].split("+")[0], record["part"])
        assert record["range_before"] == pytest.approx(input_range(before[key]), rel=1e-4)
        assert record["range_after"] == pytest.approx(input_range(after[key]), rel=1e-3)
        assert record["range_after"] <= record["range_before"] * (1 + 1e-6)
        shrunk += record["range_after"] < 0.99 * record["range_before"]
    assert shrunk > 10


def test_a_cap_of_one_is_no_dilation(tiny_session):
    session = tiny_session()
    WeightDilation(max_factor=1.0).apply(session)
    for name, layer in session.layers().items():
        assert torch.equal(layer.weight.detach(), float_weight(session, name)), name
        assert not layer.scales_input


def test_it_comes_before_the_ranges(tiny_session):
    session = tiny_session()
    session.ensure_ranges()
    with pytest.raises(StepQuantError, match="step 'weight_dilation' comes after one that needs"):
        WeightDilation().apply(session)
