import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stepquant.calibration.ranges import search_weight_range
from stepquant.errors import StepQuantError
from stepquant.methods.bit_allocation import BitAllocation, allocate_bits, hull_segments
from stepquant.recipe import parse_recipe
from stepquant.runtime.pack import pack_model
from stepquant.runtime.packed import PackedLayer
from stepquant.scheme import Scheme
from stepquant.workfolder import WorkFolder


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
    BitAllocation(samples=6).apply(session)
    return session


def test_the_mean_of_the_model_is_the_scheme_s(allocated):
    layers = [layer for layer in allocated.layers().values() if layer.weight_bits == 2]
    weights = sum(layer.weight.numel() for layer in layers)
    used = sum(int(layer.channel_bits.sum()) * layer.weight[0].numel() for layer in layers)
    summary = allocated.summary["bit_allocation"]
    assert summary["mean_bits"] == used / weights
    assert 1.99 < summary["mean_bits"] <= 2
    for name, layer in allocated.layers().items():
        assert layer.weight_bits == 2 or (layer.channel_bits == 8).all(), name
    assert len({int(bits) for layer in layers for bits in layer.channel_bits}) > 2


def test_the_sum_of_errors_falls(allocated):
    records = allocated.summary["bit_allocation"]["layers"]
    assert sum(r["error"] for r in records) < 0.8 * sum(r["uniform_error"] for r in records)


def test_grids_are_those_of_the_bits(allocated):
    for layer in allocated.layers().values():
        for _, quantizer, weight in layer.parts():
            scale, zero = quantizer.scale.clone(), quantizer.zero_point.clone()
            quantizer.fit(weight, search_weight_range)
            assert torch.equal(quantizer.scale, scale)
            assert torch.equal(quantizer.zero_point, zero)


def test_it_packs_at_its_own_density(allocated):
    model = pack_model(copy.deepcopy(allocated.model))
    layers = [m for m in model.modules() if isinstance(m, PackedLayer) and m.spec.weight_bits < 8]
    bytes_used = sum(layer.weight_packed.numel() for layer in layers)
    weights = sum(layer.spec.columns * layer.spec.out_channels for layer in layers)
    assert weights * 2 / 8 <= bytes_used + 8 * len(layers)
    assert bytes_used <= weights * 2 / 8 + 8 * len(layers)  # a group of bits ends with a whole byte


def test_a_finished_one_is_taken_from_the_work_folder(tiny_session, tmp_path, monkeypatch):
    def session_on(resume):
        work = WorkFolder(tmp_path / "work", {}, resume)
        return tiny_session(weights=2, activations=4, ranges="mse", work=work)

    first, again = session_on(False), session_on(True)
    BitAllocation(samples=6).apply(first)
    monkeypatch.setattr(BitAllocation, "_measure", None)
    BitAllocation(samples=6).apply(again)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    assert first.summary == again.summary


def test_bits_out_of_range_are_refused():
    with pytest.raises(StepQuantError, match="'bit_allocation' got 6 weight bits: expected 1 to 4"):
        BitAllocation().check(Scheme(weight_bits=6))
    BitAllocation(most=6).check(Scheme(weight_bits=6))


def test_a_range_upside_down_is_refused():
    recipe = {
        "name": "x",
        "description": "x",
        "steps": [{"bit_allocation": {"fewest": 3, "most": 2}}],
    }
    with pytest.raises(StepQuantError, match="fewest of step 'bit_allocation' is 3"):
        parse_recipe(recipe, "recipe 'x'")
