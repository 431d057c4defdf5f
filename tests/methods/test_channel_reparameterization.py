from __future__ import annotations

import math

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.methods import ChannelReparameterization, WeightDilation
from stepquant.methods.channel_reparameterization import reparameterization_factors
from stepquant.methods.recipe import parse_recipe, parse_step
from stepquant.quantizers import QuantConv2d
from stepquant.support.errors import StepQuantError


def by_brute_force(p: torch.Tensor, truncation: float) -> list[float]:
    """Equations 3 to 5, one channel and step after another in Python's floats (float64)."""
    rows = p.tolist()
    factors = []
    for d in range(p.shape[1]):
        above, below = 0.0, 0.0
        for row in rows:
            if row[d] > 0:
                ratio = row[d] / min(value for value in row if value > 0)
                above += row[d] * min(ratio, truncation)
                below += row[d]
        factors.append(above / below if below else 1.0)
    return factors


def ranges(steps: int, channels: int, seed: int, zeros: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(steps, channels, generator=generator).exp()
    return torch.where(torch.rand(p.shape, generator=generator) < zeros, 0.0, p)


def test_a_case_worked_by_hand():
    p = torch.tensor([[1.0, 2.0, 4.0], [3.0, 2.0, 2.0]])
    # s = (1, 2). Ratios (1, 2, 4) and (1.5, 1, 1).
    expected = [(1 * 1 + 3 * 1.5) / 4, (2 * 2 + 2 * 1) / 4, (4 * 4 + 2 * 1) / 6]
    assert reparameterization_factors(p, 10.0).tolist() == pytest.approx(expected)


def test_ratios_are_truncated_before_the_mean():
    p = torch.tensor([[1.0, 2.0, 4.0], [3.0, 2.0, 2.0]])
    expected = [(1 * 1 + 3 * 1.5) / 4, (2 * 2 + 2 * 1) / 4, (4 * 3 + 2 * 1) / 6]
    assert reparameterization_factors(p, 3.0).tolist() == pytest.approx(expected)


def test_one_step_makes_all_channels_as_small_as_the_smallest():
    p = ranges(1, 6, 0)
    after = p[0] / reparameterization_factors(p, 1e6)
    torch.testing.assert_close(after, p.amin().expand(6))


def test_a_truncation_of_one_changes_nothing():
    assert reparameterization_factors(ranges(4, 5, 0), 1.0).tolist() == [1.0] * 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (5, 4), (50, 16)], ids=str)
@pytest.mark.parametrize("zeros", [0.0, 0.4], ids=["live", "with dead channels"])
@pytest.mark.parametrize("truncation", [2.0, 10.0, 1e6])
def test_factors_are_those_of_a_brute_force_computation(shape, zeros, truncation):
    for seed in range(3):
        p = ranges(*shape, seed, zeros)
        found = reparameterization_factors(p, truncation)
        assert found.shape == (shape[1],)
        assert found.dtype == p.dtype
        assert found.tolist() == pytest.approx(by_brute_force(p, truncation), rel=1e-6)


# Dead channels.


def test_a_channel_that_is_always_zero_gets_one_and_leaves_the_others_alone():
    p = ranges(4, 3, 0)
    dead = torch.cat([p[:, :1], torch.zeros(4, 1), p[:, 1:]], dim=1)
    found = reparameterization_factors(dead, 10.0)
    assert found[1] == 1.0
    assert torch.equal(found[[0, 2, 3]], reparameterization_factors(p, 10.0))


def test_a_channel_that_is_zero_at_a_step_takes_its_factor_from_the_others():
    p = torch.tensor([[0.0, 2.0, 4.0], [3.0, 1.0, 2.0]])
    expected = [3.0, (2 * 1 + 1 * 1) / 3, (4 * 2 + 2 * 2) / 6]
    assert reparameterization_factors(p, 10.0).tolist() == pytest.approx(expected)


def test_a_step_at_which_all_channels_are_zero_does_not_count():
    p = ranges(3, 4, 0)
    with_dead_step = torch.cat([p, torch.zeros(1, 4)])
    expected = reparameterization_factors(p, 10.0)
    assert torch.equal(reparameterization_factors(with_dead_step, 10.0), expected)
    assert reparameterization_factors(torch.zeros(2, 3), 10.0).tolist() == [1.0] * 3


@pytest.mark.parametrize("almost", [1e-30, 1e-41], ids=["tiny", "subnormal"])
def test_beside_an_almost_dead_channel_factors_stop_at_the_truncation(almost):
    p = torch.tensor([[almost, 1.0, 3e38]]).repeat(3, 1)
    assert reparameterization_factors(p, 10.0).tolist() == [1.0, 10.0, 10.0]


@st.composite
def any_ranges(draw):
    """Any magnitudes, zeros among them; float32."""
    steps, channels = draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    numbers = st.floats(2.0**-20, 2.0**20, width=32) | st.sampled_from([0.0, 1.0, 3.0])
    count = steps * channels
    values = draw(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float32).view(steps, channels)


@settings(max_examples=60)
@given(any_ranges(), st.sampled_from([1.0, 1.1, 10.0, 1e9]))
def test_factors_lie_between_one_and_the_truncation(p, truncation):
    r = reparameterization_factors(p, truncation)
    assert (r >= 1).all()
    assert (r <= truncation).all()
    assert r.tolist() == pytest.approx(by_brute_force(p, truncation), rel=1e-6)


@settings(max_examples=60)
@given(any_ranges(), st.floats(1e-3, 1e3))
def test_a_common_scale_of_all_ranges_does_not_matter(p, scale):
    expected = reparameterization_factors(p, 10.0)
    torch.testing.assert_close(
        reparameterization_factors(p * scale, 10.0), expected, rtol=1e-5, atol=0
    )
    assert torch.equal(reparameterization_factors(p * 8.0, 10.0), expected)


# On a real (tiny) UNet.


@pytest.fixture(scope="module", params=["conv", "all"])
def applied(request, tiny_session):
    session = tiny_session()
    ChannelReparameterization(layers=request.param).apply(session)
    return session, request.param


@pytest.fixture(scope="module")
def seen(tiny_session):
    """Layer -> `p [T, C_in]`, from hooks on the float model."""
    session = tiny_session()
    data = session.trajectories
    found = {name: [] for name in session.layers()}

    def look(name, module, args):
        channel_dim = 1 if isinstance(module, torch.nn.Conv2d) else -1
        found[name].append(args[0].movedim(channel_dim, 0).flatten(1).abs().amax(dim=1))

    handles = [
        session.float_model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: look(name, module, args)
        )
        for name in found
    ]
    with torch.no_grad():
        for row, timestep in enumerate(data.timesteps):
            session.float_model(data.step(row).sample, timestep)
    for handle in handles:
        handle.remove()
    return {name: torch.stack(rows) for name, rows in found.items()}


def expected_factors(session, seen, name):
    parts = seen[name].split(session.layers()[name].splits, dim=1)
    return torch.cat([reparameterization_factors(p, 10.0) for p in parts])


def folds(session):
    return session.adapter.folds(session.float_model)


@torch.no_grad()
def difference(session):
    data = session.trajectories
    expected = session.float_model(data.sample, data.timestep).sample
    found = session.model(data.sample, data.timestep).sample
    return float((found - expected).abs().max() / expected.abs().max())


def test_the_float_output_is_unchanged(applied):
    session, _ = applied
    assert not any(layer.quantizing for layer in session.layers().values())
    assert difference(session) <= 1e-5


def test_weights_take_up_the_factors_of_their_input(applied, seen):
    session, layers = applied
    producers = {producer for producer, _ in folds(session)}
    changed = 0
    for name, layer in session.layers().items():
        before = session.float_model.get_submodule(name).weight.detach()
        if layers == "conv" and not isinstance(layer, QuantConv2d):
            assert torch.equal(layer.weight.detach(), before), name
        elif layers == "conv" or name not in producers:
            r = expected_factors(session, seen, name)
            expected = before * r.view(1, -1, *(1,) * (before.dim() - 2))
            torch.testing.assert_close(layer.weight.detach(), expected)
            changed += bool((r > 1.1).any())
    assert changed > 15


def test_the_inverse_is_folded_where_that_is_exact_and_kept_elsewhere(applied, seen):
    session, layers = applied
    consumers = {name for _, group in folds(session) for name in group}
    for name, layer in session.layers().items():
        if name in consumers or (layers == "conv" and not isinstance(layer, QuantConv2d)):
            assert not layer.scales_input, name
        else:
            r = expected_factors(session, seen, name)
            torch.testing.assert_close(layer.inverse_channel_scale, 1 / r)
    records = session.summary["channel_reparameterization"]
    folded = {name for r in records if r["folded"] for name in r["layer"].split("+")}
    assert folded == (consumers if layers == "all" else set())


def test_producers_take_up_the_inverse_of_what_is_folded(applied, seen):
    session, layers = applied
    for producer, group in folds(session):
        r = expected_factors(session, seen, group[0])
        old, new = (m.get_submodule(producer) for m in (session.float_model, session.model))
        expected = old.bias.detach() / (r if layers == "all" else 1.0)
        torch.testing.assert_close(new.bias.detach(), expected)


def test_the_summary_has_each_input_of_the_chosen_layers_once(applied):
    session, layers = applied
    records = session.summary["channel_reparameterization"]
    found = [(name, r["part"]) for r in records for name in r["layer"].split("+")]
    assert len(found) == len(set(found))
    assert set(found) == {
        (name, part)
        for name, layer in session.layers().items()
        if layers == "all" or isinstance(layer, QuantConv2d)
        for part in range(len(layer.splits))
    }
    assert all(r["range_after"] <= r["range_before"] * (1 + 1e-6) for r in records)
    assert sum(r["range_after"] < 0.9 * r["range_before"] for r in records) > 10


def test_the_truncation_reaches_the_layers(tiny_session):
    session = tiny_session()
    ChannelReparameterization(truncation=1.0).apply(session)
    assert not any(layer.scales_input for layer in session.layers().values())
    session = tiny_session()
    ChannelReparameterization(truncation=1.5).apply(session)
    smallest = min(float(q.inverse_channel_scale.min()) for q in session.layers().values())
    assert math.isclose(smallest, 1 / 1.5, rel_tol=0.01)
    assert smallest >= 1 / 1.5 * (1 - 1e-6)


def test_it_combines_with_dilation(tiny_session):
    session = tiny_session()
    WeightDilation().apply(session)
    ChannelReparameterization(layers="all").apply(session)
    assert difference(session) <= 1e-4


def test_it_comes_before_the_ranges(tiny_session):
    session = tiny_session()
    session.ensure_ranges()
    with pytest.raises(StepQuantError, match="step 'channel_reparameterization' comes after one"):
        ChannelReparameterization().apply(session)


# In a recipe.


def test_it_survives_yaml_in_a_recipe():
    step = ChannelReparameterization(truncation=4.0, layers="all")
    recipe = parse_recipe({"name": "x", "description": "", "steps": [step]}, "x")
    again = parse_recipe(yaml.safe_load(recipe.to_yaml()), "x")
    assert again == recipe
    assert again.steps == (step,)
    assert recipe.override({"channel_reparameterization.truncation": 100}).steps == (
        ChannelReparameterization(truncation=100.0, layers="all"),
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"truncation": 0.5}, "key 'truncation' is 0.5: input should be greater than or equal to"),
        ({"truncation": math.inf}, "key 'truncation' is inf"),
        ({"truncation": math.nan}, "key 'truncation' is nan"),
        ({"layers": "linear"}, "key 'layers' is 'linear': input should be 'conv' or 'all'"),
        ({"cap": 3}, "unknown key 'cap', expected one of truncation, layers"),
    ],
    ids=["below one", "infinite", "not a number", "other layers", "unknown key"],
)
def test_bad_settings_are_named(values, told):
    with pytest.raises(StepQuantError) as caught:
        parse_step({"channel_reparameterization": values})
    assert str(caught.value).startswith("step 'channel_reparameterization': ")
    assert told in str(caught.value)
