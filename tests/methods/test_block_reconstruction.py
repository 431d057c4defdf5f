from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantize_runs import SMALL
from stepquant.calibration.block_inputs import BlockData
from stepquant.calibration.ranges import search_weight_range
from stepquant.methods import BlockReconstruction, LowRankAdapters, Smoothing, TemporalQuantizer
from stepquant.methods.block_reconstruction import (
    annealed_beta,
    rounding_penalty,
    unrounded_weights,
)
from stepquant.methods.recipe import load_recipe, parse_step
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import WorkFolder

TINY = {"iterations": 8, "batch": 8, "samples": 32}
ATTENTION = "mid_block.attentions.0"


def ready(tiny_session, **options):
    """A session with tables and ranges, quantizing."""
    session = tiny_session(**{"activations": 4, "num": 8, "steps": 4, **SMALL, **options})
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    return session


def state_of(session):
    return {name: value.clone() for name, value in session.model.state_dict().items()}


def assert_floor_or_ceiling(layer, before):
    """Each code of `layer` is the one below or above the weight `before`, and survives packing."""
    for (_, quantizer, weight), old in zip(
        layer.parts(), before.split(layer.splits, dim=1), strict=True
    ):
        scale, zero_point, bits = (
            v.detach().double().view(-1, *(1,) * (weight.dim() - 1))
            for v in (quantizer.scale, quantizer.zero_point, quantizer.channel_bits)
        )
        free, codes, top = old.double() / scale + zero_point, quantizer.codes(weight), 2**bits - 1
        # A hair's breadth: `w / s` in float32 may lie on the other side of a whole number.
        low, high = (free - 1e-4).floor(), (free + 1e-4).ceil()
        assert (codes >= low.clamp(min=0).minimum(top)).all()
        assert (codes <= high.clamp(min=0).minimum(top)).all()
    assert torch.equal(pack_layer(layer).float_weight(), layer.quantized_weight().detach())


@pytest.mark.parametrize("beta", [20.0, 7.5, 2.0])
def test_the_penalty_is_the_published_sum(beta):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3
    h = (1.2 / (1 + (-logits.double()).exp()) - 0.1).clamp(0, 1)
    expected = sum(1 - abs(2 * value - 1) ** beta for value in h.flatten().tolist())
    assert float(rounding_penalty(logits, beta)) == pytest.approx(expected, rel=1e-5)


def test_the_penalty_vanishes_once_all_is_settled_and_pulls_away_from_the_middle():
    assert rounding_penalty(torch.tensor([9.0, -9.0, 2.5]), 2) == 0
    logits = torch.tensor([0.4, -0.4], requires_grad=True)
    rounding_penalty(logits, 2).backward()
    assert logits.grad[0] < 0 < logits.grad[1]


def test_beta_falls_from_20_to_2_after_the_warm_up():
    found = [annealed_beta(iteration, 100, 0.2) for iteration in (0, 19, 20, 60, 99)]
    assert found == [None, None, 20, 11, pytest.approx(2.225)]
    assert annealed_beta(0, 100, 0.0) == 20
    assert annealed_beta(99, 100, 1.0) is None


@pytest.fixture
def correlated(simulate, context):
    """A layer of 3 bits, inputs that share three causes, and what the float layer gives."""
    torch.manual_seed(0)
    layer = simulate(nn.Linear(32, 16), weight_bits=3, activation_bits=8, steps=1)
    inputs = layer.activation_quantizers[0]
    inputs.scale.data.fill_(0.08)
    inputs.zero_point.data.fill_(128)
    x = torch.randn(512, 3) @ torch.randn(3, 32) + 0.1 * torch.randn(512, 32)
    target = nn.functional.linear(x, layer.weight, layer.bias).detach()
    session = SimpleNamespace(
        context=context,
        float_model=None,
        adapter=SimpleNamespace(time_embedding_layers=lambda _: set()),
        layers=lambda: {"layer": layer},
        reporter=Reporter(quiet=True),
    )
    return layer, BlockData((x,), {}, target, torch.zeros(512)), session


@pytest.mark.parametrize("activations", ["together", "after"])
def test_learned_rounding_beats_the_nearest_on_correlated_inputs(correlated, activations):
    """Errors of neighbours cancel where inputs go together; nearest rounding cannot know."""
    layer, data, session = correlated
    before = layer.weight.detach().clone()
    scale, bias = layer.weight_quantizers[0].scale.detach().clone(), layer.bias.detach().clone()
    step = BlockReconstruction(iterations=200, activation_rate=0.0, activations=activations)
    generator = torch.Generator().manual_seed(0)
    first, last = step._train(session, {layer: before}, "layer", layer, data, generator)
    assert last < first / 3
    assert_floor_or_ceiling(layer, before)
    assert not torch.equal(layer.quantized_weight(), layer.weight_quantizers[0](before))
    assert torch.equal(layer.weight_quantizers[0].scale, scale) and torch.equal(layer.bias, bias)
    assert layer.roundings == () and layer.weight.grad is None


def test_the_loss_told_is_that_of_the_hard_rounding(correlated):
    layer, data, session = correlated
    step = BlockReconstruction(iterations=40)
    generator = torch.Generator().manual_seed(0)
    weights = {layer: layer.weight.detach().clone()}
    _, last = step._train(session, weights, "layer", layer, data, generator)
    with torch.no_grad():
        found = pack_layer(layer)(data.args[0][448:])
    power = data.target.square().mean()
    measured = float((found - data.target[448:]).square().mean() / power)
    assert last == pytest.approx(measured, rel=1e-4)


@pytest.fixture(scope="module", params=["together", "after"])
def reconstructed(request, tiny_session):
    """A session after reconstruction, with the weights and the state before."""
    session = ready(tiny_session)
    weights, before = unrounded_weights(session), state_of(session)
    BlockReconstruction(**{**TINY, "activations": request.param}).apply(session)
    return session, weights, before


def test_no_block_ends_above_its_start_and_most_improve(reconstructed):
    session, *_ = reconstructed
    records = session.summary["block_reconstruction"]
    assert {record["block"] for record in records} == set(
        session.adapter.blocks(session.float_model)
    )
    assert all(record["loss_after"] <= record["loss_before"] for record in records)
    improved = [r for r in records if r["loss_after"] < 0.98 * r["loss_before"]]
    assert len(improved) > len(records) / 2
    assert any(0 < record["rounded_elsewhere"] < 0.5 for record in records)


def test_every_code_is_floor_or_ceiling_and_packs_as_simulated(reconstructed):
    _, weights, _ = reconstructed
    assert any(len(layer.splits) == 2 for layer in weights)
    for layer, before in weights.items():
        assert_floor_or_ceiling(layer, before)


def test_only_weights_and_activation_tables_are_changed(reconstructed):
    session, _, before = reconstructed
    moved = {n for n, value in session.model.state_dict().items() if (value != before[n]).any()}
    assert all(name.endswith(".weight") or "activation_quantizers" in name for name in moved)
    assert any("activation_quantizers" in name for name in moved)
    assert session.model.state_dict().keys() == before.keys()
    assert all(parameter.grad is None for parameter in session.model.parameters())
    assert not any(layer.roundings for layer in session.layers().values())


def test_mixed_bits_half_zero_points_and_kept_scales(tiny_session):
    """Two parts, in-channel scales that cannot be folded, and 1 to 3 bits in one layer."""
    session = tiny_session(weights=2, num=4, **SMALL)
    Smoothing().apply(session)
    TemporalQuantizer().apply(session)
    session.ensure_ranges()
    for name, layer in session.layers().items():
        if name.startswith("up_blocks"):
            layer.set_channel_bits(torch.arange(layer.out_channels) % 3 + 1)
            layer.fit_weights(search_weight_range)
    layers = list(session.layers().values())
    assert any(layer.scales_input for layer in layers)
    assert any((q.zero_point % 1 == 0.5).any() for layer in layers for q in layer.weight_quantizers)
    weights = unrounded_weights(session)
    BlockReconstruction(**{**TINY, "iterations": 4, "samples": 16}).apply(session)
    records = session.summary["block_reconstruction"]
    assert sum(record["rounded_elsewhere"] > 0 for record in records) > 4
    for layer, before in weights.items():
        assert_floor_or_ceiling(layer, before)


def test_absurd_rates_leave_every_block_as_it_was_or_better(tiny_session):
    session = ready(tiny_session)
    step = BlockReconstruction(
        **{**TINY, "iterations": 3, "rounding_rate": 1e3, "activation_rate": 1e3}
    )
    step.apply(session)
    for record in session.summary["block_reconstruction"]:
        assert record["loss_after"] <= record["loss_before"]


@pytest.mark.parametrize("activations", ["together", "after"])
def test_no_iterations_leave_everything_bitwise_alone(tiny_session, activations):
    session = ready(tiny_session, num=4)
    before = state_of(session)
    step = BlockReconstruction(iterations=0, batch=8, samples=16, activations=activations)
    step.apply(session)
    assert all(torch.equal(v, before[n]) for n, v in session.model.state_dict().items())
    records = session.summary["block_reconstruction"]
    assert all(record["rounded_elsewhere"] == 0 for record in records)


def test_a_second_reconstruction_still_rounds_the_weights_from_before_the_first(tiny_session):
    session = ready(tiny_session, num=4)
    step = BlockReconstruction(**{**TINY, "iterations": 4, "batch": 4})
    weights, data = unrounded_weights(session), session.trajectories.subset(16, 0)
    step.reconstruct(session, "first", data, weights)
    codes = state_of(session)
    step.reconstruct(session, "second", data, weights)
    assert any((value != codes[n]).any() for n, value in state_of(session).items())
    for first, second in zip(session.summary["first"], session.summary["second"], strict=True):
        assert first["block"] == second["block"]
        assert second["loss_after"] <= second["loss_before"]
    for layer, before in weights.items():
        assert_floor_or_ceiling(layer, before)


def test_low_rank_adapters_are_merged_first(tiny_session):
    session = ready(tiny_session, num=4)
    LowRankAdapters(rank=2, start="quantization_error").apply(session)
    expected = {n: la.quantized_weight().detach() for n, la in session.layers().items()}
    BlockReconstruction(iterations=0, batch=8, samples=16).apply(session)
    for name, layer in session.layers().items():
        assert layer.adapter is None
        assert torch.equal(layer.quantized_weight(), expected[name])


def test_finished_blocks_are_taken_from_the_work_folder(tiny_session, tmp_path, one_thread):
    settings, job = {**TINY, "iterations": 2, "batch": 4, "samples": 16}, {"a": 1}
    first = ready(tiny_session, num=4, work=WorkFolder(tmp_path / "work", job, False))
    BlockReconstruction(**settings).apply(first)
    files = sorted((tmp_path / "work" / "block_reconstruction").iterdir())
    assert len(files) == 9
    whole = {file.name: file.read_bytes() for file in files}
    for file in files[5:]:
        file.unlink()
    again = ready(tiny_session, num=4, work=WorkFolder(tmp_path / "work", job, True))
    BlockReconstruction(**settings).apply(again)
    assert {file.name: file.read_bytes() for file in files} == whole
    expected = state_of(first)
    assert all(torch.equal(v, expected[n]) for n, v in again.model.state_dict().items())
    records = [s.summary["block_reconstruction"] for s in (first, again)]
    assert [r["rounded_elsewhere"] for r in records[0]] == [
        r["rounded_elsewhere"] for r in records[1]
    ]


def test_a_loss_that_is_not_finite_names_block_and_step(tiny_session):
    session = ready(tiny_session, num=4)
    session.float_model.get_submodule(ATTENTION).to_out[0].bias.data.fill_(float("nan"))
    with pytest.raises(
        StepQuantError, match=rf"loss of block '{ATTENTION}' is nan in step 'block_reconstruction'"
    ):
        BlockReconstruction(iterations=1, batch=4, samples=16).apply(session)


def test_a_single_calibration_input_is_refused(tiny_session):
    session = ready(tiny_session, num=1, steps=1)
    with pytest.raises(
        StepQuantError, match="step 'block_reconstruction' has 1 calibration input: expected at"
    ):
        BlockReconstruction(**TINY).apply(session)


@pytest.mark.parametrize(
    ("key", "value"),
    [("penalty", -1), ("warm_up", 1.5), ("rounding_rate", float("nan")), ("activations", "before")],
)
def test_bad_settings_are_named(key, value):
    with pytest.raises(StepQuantError, match=f"step 'block_reconstruction': key '{key}' is"):
        parse_step({"block_reconstruction": {key: value}})


def test_q_diffusion_has_static_activation_quantizers_and_one_step():
    recipe = load_recipe("q-diffusion")
    assert [step.name for step in recipe.steps] == ["block_reconstruction"]
    assert recipe.ranges.weights == recipe.ranges.activations == "mse"
