import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from stepquant.calibration.ranges import search_weight_range
from stepquant.calibration.rounding_errors import weight_error
from stepquant.methods.bit_allocation import BitAllocation, allocate_bits, hull_segments
from stepquant.methods.recipe import parse_recipe
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.simulation.packing import pack_model
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder


def cost_of(chosen, columns):
    return sum(int(bits.sum()) * cost for bits, cost in zip(chosen, columns, strict=True))


def error_of(chosen, errors, widths):
    return sum(
        float(table.gather(0, bits[None].long() - widths[0]).sum())
        for bits, table in zip(chosen, errors, strict=True)
    )


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (4, [[1, 1], [1]]),
        (5, [[2, 1], [1]]),
        (7, [[2, 1], [2]]),
        (8, [[3, 1], [2]]),
        (99, [[3, 3], [3]]),
    ],
)
def test_a_hand_worked_case(budget, expected):
    # At 1, 2 and 3 bits. Gains per bit: first layer (1 weight a channel) 6, 2 and 1, 0.5; second
    # layer (2 weights a channel) 8 / 2 and 1 / 2.
    first = torch.tensor([[9.0, 2.0], [3.0, 1.0], [1.0, 0.5]])
    second = torch.tensor([[10.0], [2.0], [1.0]])
    chosen = allocate_bits([first, second], [1, 2], range(1, 4), budget)
    assert [bits.tolist() for bits in chosen] == expected


def test_the_hull_jumps_over_widths_that_save_little_by_themselves():
    assert hull_segments(np.array([10.0, 9.5, 2.0, 1.0])) == [(0, 2), (2, 3)]
    assert hull_segments(np.array([10.0, 11.0, 12.0])) == []
    assert hull_segments(np.array([10.0, 4.0, 4.0, 5.0])) == [(0, 1)]
    # Twice the same gain, of which the second comes out larger by rounding.
    assert hull_segments(np.array([25.0, 16.0, 8.0 - 1e-15, 0.0 - 4e-15])) == [
        (0, 1),
        (1, 2),
        (2, 3),
    ]


falls = st.lists(st.floats(0.01, 10.0), min_size=3, max_size=3).map(
    lambda values: sorted(values, reverse=True)
)


@given(st.lists(falls, min_size=1, max_size=5), st.integers(0, 12))
def test_no_allocation_of_at_most_its_cost_is_better(channel_gains, spare):
    # Convex errors and equal costs: then taking the largest gains first is the best there is.
    table = torch.tensor(channel_gains, dtype=torch.float64).T  # gains of each further bit
    errors = torch.cat([table.sum(dim=0, keepdim=True), table.sum(dim=0) - table.cumsum(dim=0)])
    widths, channels = range(1, 5), len(channel_gains)
    chosen = allocate_bits([errors], [1], widths, channels + spare)
    assert cost_of(chosen, [1]) == min(channels + spare, 4 * channels)
    best = min(
        error_of([torch.tensor(bits)], [errors], widths)
        for bits in itertools.product(widths, repeat=channels)
        if sum(bits) <= channels + spare
    )
    assert error_of(chosen, [errors], widths) == pytest.approx(best, abs=1e-9)


@given(st.data())
def test_the_budget_is_never_exceeded_and_more_of_it_never_hurts(data):
    columns = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    errors = [torch.rand(4, 3, generator=generator) for _ in columns]
    lowest = 3 * sum(columns)
    found = []
    for budget in (lowest, 2 * lowest, 3 * lowest):
        chosen = allocate_bits(errors, columns, range(1, 5), budget)
        assert cost_of(chosen, columns) <= budget
        found.append(error_of(chosen, errors, range(1, 5)))
    assert found == sorted(found, reverse=True)


@pytest.fixture(scope="module")
def allocated(tiny_session):
    session = tiny_session(weights=2, activations=4, ranges="mse")
    BitAllocation(samples=8).apply(session)
    session.ensure_ranges()
    return session


def test_the_means_of_the_model_are_the_scheme_s(allocated):
    layers = [layer for layer in allocated.layers().values() if layer.weight_bits == 2]
    weights = sum(layer.weight.numel() for layer in layers)
    used = sum(int(layer.channel_bits.sum()) * layer.weight[0].numel() for layer in layers)
    summary = allocated.summary["bit_allocation"]
    assert summary["mean_weight_bits"] == used / weights
    assert 1.99 < summary["mean_weight_bits"] <= 2
    values = sum(row["values"] for row in summary["activations"])
    used = sum(row["values"] * row["bits"] for row in summary["activations"])
    assert summary["mean_activation_bits"] == used / values
    assert 3.9 < summary["mean_activation_bits"] <= 4
    assert len({int(bits) for layer in layers for bits in layer.channel_bits}) > 2
    assert len({layer.activation_bits for layer in layers}) > 2


def test_input_and_output_layers_keep_their_eight_bits(allocated):
    for name in ("conv_in", "conv_out"):
        layer = allocated.layers()[name]
        assert (layer.channel_bits == 8).all()
        assert layer.activation_bits == 8
        assert all(quantizer.bits == 8 for quantizer in layer.activation_quantizers)


def test_the_expected_error_falls_for_weights_and_for_activations(allocated):
    for kind in ("weights", "activations"):
        rows = allocated.summary["bit_allocation"][kind]
        assert sum(r["error"] for r in rows) < 0.7 * sum(r["uniform_error"] for r in rows), kind


def test_the_real_error_of_the_prediction_falls(allocated, tiny_session):
    uniform = tiny_session(weights=2, activations=4, ranges="mse")
    uniform.ensure_ranges()
    errors = []
    for session in (allocated, uniform):
        data = session.trajectories
        with torch.no_grad():
            target, found = (
                model(data.sample, data.timestep).sample
                for model in (session.float_model, session.model)
            )
        errors.append(float((found - target).square().sum()))
    assert errors[0] < 0.7 * errors[1]


def test_ranges_that_come_after_are_those_of_the_bits(allocated):
    for layer in allocated.layers().values():
        for activations, quantizer, weight in layer.parts():
            scale, zero = quantizer.scale.clone(), quantizer.zero_point.clone()
            quantizer.fit(weight, search_weight_range)
            assert torch.equal(quantizer.scale, scale)
            assert torch.equal(quantizer.zero_point, zero)
            assert activations.bits == layer.activation_bits
            assert (activations.zero_point <= 2**activations.bits - 1).all()


def test_it_packs_at_its_own_density_and_computes_the_same(allocated):
    model = pack_model(copy.deepcopy(allocated.model))
    layers = [m for m in model.modules() if isinstance(m, IntegerLayer) and m.spec.weight_bits < 8]
    bytes_used = sum(layer.weight_packed.numel() for layer in layers)
    weights = sum(layer.spec.columns * layer.spec.out_channels for layer in layers)
    assert abs(bytes_used - weights * 2 / 8) <= 8 * len(layers)  # bits end with a whole byte
    data = allocated.trajectories
    with torch.no_grad():
        packed = model(data.sample, data.timestep).sample
        simulated = allocated.model(data.sample, data.timestep).sample
    difference = (packed - simulated).square().sum() / simulated.square().sum()
    assert float(difference) < 1e-3


def test_errors_of_the_prediction_are_what_the_float_model_s_prediction_moves_by(tiny_session):
    """The sum of what is expected of all weights, against all of them really rounded."""
    session = tiny_session(weights=4, activations=8, num=16)
    four = {"fewest_weight_bits": 4, "most_weight_bits": 4}
    BitAllocation(samples=48, errors_of="prediction", **four).apply(session)
    expected = sum(row["error"] for row in session.summary["bit_allocation"]["weights"])
    for layer in session.layers().values():
        if layer.weight_bits == 4:
            layer.weight.data += weight_error(layer, 4, minmax_weight_range)
    data = session.trajectories
    with torch.no_grad():
        target, found = (
            model(data.sample, data.timestep).sample
            for model in (session.float_model, session.model)
        )
    error, power = (x.flatten(1).square().sum(dim=1) for x in (found - target, target))
    # First order, independent errors, a few dozen projections: within a factor of two.
    assert 0.5 < float((error / power).mean()) / expected < 2


def test_a_sampler_with_a_memory_is_refused_unless_the_prediction_is_what_counts(tiny_session):
    session = tiny_session(weights=2, activations=4)
    session.scheduler = EulerDiscreteScheduler()
    with pytest.raises(StepQuantError, match="errors_of: prediction"):
        BitAllocation(samples=2).apply(session)
    BitAllocation(samples=2, errors_of="prediction").apply(session)
    assert session.summary["bit_allocation"]["mean_weight_bits"] <= 2


@pytest.mark.parametrize("of", ["weights", "activations"])
def test_one_kind_alone_leaves_the_other_as_it_is(tiny_session, of):
    session = tiny_session(weights=2, activations=4)
    BitAllocation(samples=2, of=of).apply(session)
    layers = session.layers().values()
    uniform_weights = all((q.channel_bits == q.weight_bits).all() for q in layers)
    uniform_inputs = {q.activation_bits for q in layers} == {4, 8}
    assert (uniform_weights, uniform_inputs) == (of == "activations", of == "weights")
    summary = session.summary["bit_allocation"]
    other = {"weights": "activation", "activations": "weight"}[of]
    assert summary[f"mean_{other}_bits"] is None
    assert summary[f"{other}s"] == []


def test_where_all_have_the_most_bits_nothing_changes_and_it_is_said(tiny_session, capsys):
    session = tiny_session(weights=8, activations=8)
    session.reporter = Reporter()
    BitAllocation(samples=2).apply(session)
    assert (
        "step 'bit_allocation' finds no layer whose bits it may change" in capsys.readouterr().err
    )
    assert {layer.activation_bits for layer in session.layers().values()} == {8}


def test_a_finished_one_is_taken_from_the_work_folder(tiny_session, tmp_path, monkeypatch):
    def session_on(resume):
        work = WorkFolder(tmp_path / "work", {}, resume)
        return tiny_session(weights=2, activations=4, ranges="mse", work=work)

    first, again = session_on(False), session_on(True)
    BitAllocation(samples=4).apply(first)
    monkeypatch.setattr("stepquant.methods.bit_allocation.output_errors", None)
    BitAllocation(samples=4).apply(again)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    for name, layer in first.layers().items():
        assert layer.activation_bits == again.layers()[name].activation_bits, name
    assert first.summary == again.summary


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_bits_below_the_fewest_are_refused(kind):
    step = BitAllocation(**{f"fewest_{kind}_bits": 4})
    with pytest.raises(StepQuantError, match=f"'bit_allocation' got 3 {kind} bits: expected at"):
        step.check(Scheme(**{f"{kind}_bits": 3}))
    step.check(Scheme(weight_bits=8, activation_bits=8))
    other = {"weight": "activations", "activation": "weights"}[kind]
    BitAllocation(**{f"fewest_{kind}_bits": 4}, of=other).check(Scheme(**{f"{kind}_bits": 3}))


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_a_range_upside_down_is_refused(kind):
    values = {f"fewest_{kind}_bits": 5, f"most_{kind}_bits": 4}
    recipe = {"name": "x", "description": "x", "steps": [{"bit_allocation": values}]}
    with pytest.raises(StepQuantError, match=f"fewest_{kind}_bits of step 'bit_allocation' is 5"):
        parse_recipe(recipe, "recipe 'x'")
