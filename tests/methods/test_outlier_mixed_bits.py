from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quantize_runs import Lines
from stepquant.calibration.block_inputs import capture_inputs
from stepquant.calibration.ranges import search_weight_range
from stepquant.methods import OutlierMixedBits
from stepquant.methods.outlier_mixed_bits import allocate, channel_errors, kurtosis, sum_over_bits
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError
from stepquant.support.work_folder import WorkFolder


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(100_000, generator=generator)
    uniform = torch.rand(100_000, generator=generator)
    two_points = torch.tensor([-1.0, 1.0]).repeat(50_000)
    outlier = torch.zeros(100_000)
    outlier[0] = 1.0  # p = 1e-5: about 1 / p
    found = kurtosis(torch.stack([normal, uniform, two_points, outlier]))
    expected = torch.tensor([3.0, 1.8, 1.0, 1e5])
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_kurtosis_does_not_depend_on_scale_offset_or_shape():
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) ** 3
    torch.testing.assert_close(
        kurtosis(weight), kurtosis(7 * weight.flatten(1) + 2), rtol=1e-4, atol=0
    )


def test_allocation_by_hand():
    salience = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert allocate(salience, salience, 4, 1, 1).tolist() == [5, 3, 4, 4, 4]
    assert allocate(salience, salience, 4, 2, 2).tolist() == [5, 3, 5, 3, 4]
    assert allocate(salience, salience, 4, 2, 0).tolist() == [5, 4, 5, 4, 4]
    # A channel that was raised is not lowered: the next one is.
    assert allocate(salience, -salience, 4, 1, 2).tolist() == [5, 4, 3, 4, 3]


@given(
    st.lists(st.floats(-10, 10, width=32), min_size=10, max_size=40),
    st.integers(2, 7),
    st.integers(0, 5),
)
def test_equal_counts_at_both_ends_keep_the_mean(salience, bits, groups):
    count = groups * (len(salience) // 10)
    values = torch.tensor(salience)
    allocated = allocate(values, values, bits, count, count)
    assert allocated.float().mean() == bits
    assert set(allocated.tolist()) <= {bits - 1, bits, bits + 1}
    raised, lowered = values[allocated == bits + 1], values[allocated == bits - 1]
    if count:
        assert raised.min() >= lowered.max()


@pytest.mark.parametrize("build", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(12, 8, 3)])
def test_errors_add_up_over_out_channels(build, simulate):
    torch.manual_seed(0)
    layer = simulate(build(), 3, 4)
    x = torch.randn((5, 12, 6, 6) if layer.weight.dim() == 4 else (5, 7, 12))
    layer.quantizing = False
    target = layer(x).detach()
    layer.quantizing = True
    errors, _ = channel_errors(layer, x, (2, 3, 4), search_weight_range)
    bits = torch.tensor([2, 3, 4, 4, 3, 2, 3, 2])
    layer.set_channel_bits(bits)
    layer.fit_weights(search_weight_range)
    with torch.no_grad():
        expected = (layer(x) - target).square().sum() / target.square().sum()
    torch.testing.assert_close(sum_over_bits(errors, bits, 3), expected)


@pytest.fixture(scope="module")
def mixed(tiny_session):
    session = tiny_session(weights=3, activations=4, ranges="mse")
    OutlierMixedBits(samples=6).apply(session)
    return session


def test_every_layer_keeps_its_mean(mixed):
    for name, layer in mixed.layers().items():
        assert layer.channel_bits.float().mean() == layer.weight_bits, name
        if layer.weight_bits == 8:
            assert (layer.channel_bits == 8).all()
    records = mixed.summary["outlier_mixed_bits"]["layers"]
    assert {r["layer"] for r in records} | {"conv_in", "conv_out"} == set(mixed.layers())
    assert all(r["mean_bits"] == 3 for r in records)


def test_the_candidate_with_the_least_error_is_taken(mixed):
    for record in mixed.summary["outlier_mixed_bits"]["layers"]:
        layer = mixed.layers()[record["layer"]]
        best = min(range(len(record["errors"])), key=record["errors"].__getitem__)
        group = layer.out_channels // 10
        assert len(record["errors"]) == 6
        assert int((layer.channel_bits == 4).sum()) == best * group, record["layer"]


@torch.no_grad()
def relative_error(layer, x):
    """Of the quantized layer's output on the input `x`, at the timesteps of the context."""
    layer.quantizing = False
    target = layer(x)
    layer.quantizing = True
    return float((layer(x) - target).square().sum() / target.square().sum())


def test_the_error_told_is_that_of_the_layer_with_everything_before_it_mixed(mixed):
    data = mixed.trajectories.subset(6, mixed.seed)
    for record in mixed.summary["outlier_mixed_bits"]["layers"][::7]:
        (x,), _ = capture_inputs(mixed.model, record["layer"], data, len(data))
        mixed.context.set_timestep(data.timestep)
        error = relative_error(mixed.layers()[record["layer"]], x)
        assert error == pytest.approx(min(record["errors"]), rel=1e-4)


@pytest.mark.parametrize("selection", ["kurtosis", "magnitude", "random", "error"])
def test_every_selection_is_no_worse_than_uniform_bits(selection, tiny_session):
    """Layers are quantized uniformly one by one, with everything before them mixed."""
    session = tiny_session(weights=2, activations=8, ranges="mse")
    OutlierMixedBits(samples=4, selection=selection).apply(session)
    data = session.trajectories.subset(4, session.seed)
    for record in session.summary["outlier_mixed_bits"]["layers"][::5]:
        layer = session.layers()[record["layer"]]
        (x,), _ = capture_inputs(session.model, record["layer"], data, len(data))
        session.context.set_timestep(data.timestep)
        mixed, bits = relative_error(layer, x), layer.channel_bits.clone()
        layer.set_channel_bits(torch.full_like(bits, 2))
        layer.fit_weights(search_weight_range)
        uniform = relative_error(layer, x)
        layer.set_channel_bits(bits)
        layer.fit_weights(search_weight_range)
        assert mixed <= uniform * (1 + 1e-5), record["layer"]
        assert record["errors"][0] == pytest.approx(uniform, rel=1e-4)
        if selection == "error":
            assert mixed < uniform or (bits == 2).all()


def test_selection_by_error_finds_what_kurtosis_finds_or_better_with_one_group(tiny_session):
    errors = {}
    for selection in ("kurtosis", "error"):
        session = tiny_session(weights=2, activations=8, ranges="mse")
        OutlierMixedBits(samples=4, selection=selection).apply(session)
        first = session.summary["outlier_mixed_bits"]["layers"][0]  # before inputs differ
        errors[selection] = first["errors"][1]
    assert errors["error"] <= errors["kurtosis"]


def test_extra_groups_raise_the_mean(tiny_session):
    session = tiny_session(weights=2, activations=8, ranges="mse")
    OutlierMixedBits(samples=4, extra_groups=1).apply(session)
    for record in session.summary["outlier_mixed_bits"]["layers"]:
        out = session.layers()[record["layer"]].out_channels
        assert record["mean_bits"] == pytest.approx(2 + (out // 10) / out)


def test_layers_whose_bits_stay_uniform_are_named_with_the_reason(tiny_session):
    session = tiny_session(weights=4, ranges="minmax")
    session.reporter = Lines()
    layers = session.layers()
    one_bit = "mid_block.resnets.0.time_emb_proj"
    layers[one_bit].weight_bits = 1
    layers[one_bit].set_channel_bits(torch.ones(layers[one_bit].out_channels))
    OutlierMixedBits(samples=2, groups=20).apply(session)
    summary = session.summary["outlier_mixed_bits"]
    bounds = "no channel could have one bit less and more"
    expected = {"conv_in": f"weight bits 8: {bounds}", "conv_out": f"weight bits 8: {bounds}"}
    for name, layer in layers.items():
        if name not in expected and layer.out_channels < 20:
            expected[name] = f"{layer.out_channels} out-channels: fewer than the 20 groups"
    expected[one_bit] = f"weight bits 1: {bounds}"
    assert summary["uniform_layers"] == expected
    assert {record["layer"] for record in summary["layers"]} == layers.keys() - expected.keys()
    for name in expected:
        assert layers[name].channel_bits.unique().tolist() == [layers[name].weight_bits], name
    small = [name for name, layer in layers.items() if layer.out_channels < 20]
    assert session.reporter.lines == [
        f"bits stay uniform where a layer has fewer than 20 out-channels: {', '.join(small)}"
    ]


def test_nothing_is_printed_where_all_layers_have_channels_enough(tiny_session):
    session = tiny_session(weights=4, ranges="minmax", out_channels=10, in_channels=10)
    session.reporter = Lines()
    OutlierMixedBits(samples=2).apply(session)
    assert session.reporter.lines == []
    assert session.summary["outlier_mixed_bits"]["uniform_layers"].keys() == {"conv_in", "conv_out"}


@pytest.mark.parametrize("bits", [1, 8])
def test_bits_without_room_are_refused(bits):
    with pytest.raises(StepQuantError, match=f"got {bits} weight bits: expected 2 to 7"):
        OutlierMixedBits().check(Scheme(weight_bits=bits))


def test_more_extra_groups_than_groups_are_refused():
    with pytest.raises(StepQuantError, match=r"extra_groups .* is 11: expected at most groups"):
        OutlierMixedBits(extra_groups=11).check(Scheme(weight_bits=4))


def test_mixed_bits_are_taken_from_the_work_folder(tiny_session, tmp_path, one_thread):
    def run(work):
        session = tiny_session(weights=2, ranges="mse", work=work)
        OutlierMixedBits(samples=4, selection="error").apply(session)
        return session

    first = run(WorkFolder(tmp_path / "work", {}, False))
    again = run(WorkFolder(tmp_path / "work", {}, True))
    assert again.summary["outlier_mixed_bits"] == first.summary["outlier_mixed_bits"]
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
