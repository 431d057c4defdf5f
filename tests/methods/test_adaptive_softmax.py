"""The grids of attention's probabilities, and the step that chooses among them."""

from __future__ import annotations

import json
import math

import pytest
import torch

from softmax_samples import softmax, uniform
from stepquant.calibration import observe
from stepquant.methods.adaptive_softmax import FACTORS, AdaptiveSoftmax, grid_fits
from stepquant.methods.power_law import likelihood_ratio, prefers_log2, tail_of
from stepquant.methods.temporal_quantizer import TemporalQuantizer
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError

BITS = (3, 4, 6, 8)
SITES = [
    "down_blocks.1.attentions.0",
    "up_blocks.0.attentions.0",
    "up_blocks.0.attentions.1",
    "mid_block.attentions.0",
]

# The grids.


def test_the_ratio_does_not_know_the_bits_but_the_error_does() -> None:
    """What the test stands for: at 3 bits log2 is better, at 8 its levels are far too coarse."""
    values = softmax(2)
    assert prefers_log2(likelihood_ratio(tail_of(values)))
    gains = []
    for bits in BITS:
        uniform_fit, log2_fit = grid_fits(values, None, bits)
        gains.append(uniform_fit.error / log2_fit.error)
    assert gains == sorted(gains, reverse=True) and gains[0] > 2 and gains[-1] < 0.1


def test_the_uniform_grid_of_least_error_loses_small_probabilities() -> None:
    uniform_fit, log2_fit = grid_fits(softmax(2), None, 4)
    assert uniform_fit.bias < -0.2 and abs(log2_fit.bias) < 0.05


@pytest.mark.parametrize("bits", BITS)
def test_grid_fits_are_not_beaten_by_brute_force(bits: int) -> None:
    values, weights = softmax(1)[:400], uniform(400, 2)
    fits = grid_fits(values, weights, bits)
    levels = [
        torch.arange(2**bits).double(),
        torch.tensor([2.0**-q for q in range(2**bits - 1)] + [0.0]).double(),
    ]
    for fit, grid in zip(fits, levels, strict=True):
        # Errors to the nearest level; log2 codes are nearest in the logarithm, so never better.
        best = (values[:, None] - fit.scale * grid).abs().amin(dim=1).square()
        error = float((weights * best).sum() / weights.sum())
        assert error <= fit.error * (1 + 1e-9) and fit.error < 1.6 * error
        total = float((weights * values).sum() / weights.sum())
        assert abs(fit.bias) * total < math.sqrt(fit.error) + 1e-12


def test_values_on_a_grid_have_no_error() -> None:
    on_log2 = torch.tensor([0.0, 0.75, 0.375, 0.75 / 32])
    _, log2_fit = grid_fits(on_log2, None, 3)
    assert (log2_fit.error, log2_fit.bias) == (pytest.approx(0, abs=1e-20), pytest.approx(0))
    uniform_fit, _ = grid_fits(torch.arange(8.0) / 16, None, 3)
    assert uniform_fit.error < 1e-20 and uniform_fit.scale == pytest.approx(1 / 16)


def test_weights_count_like_repeated_values() -> None:
    values, counts = softmax(2)[:300], torch.randint(1, 5, (300,), generator=torch.Generator())
    repeated = values.repeat_interleave(counts)
    for a, b in zip(grid_fits(values, counts, 4), grid_fits(repeated, None, 4), strict=True):
        assert a.scale == b.scale and a.error == pytest.approx(b.error)


def test_equal_values_and_zeros_fit_any_grid() -> None:
    for fit in grid_fits(torch.full((7,), 1 / 64), None, 4):
        assert fit.error < 1e-20
    for fit in grid_fits(torch.zeros(5), None, 4):
        assert (fit.scale, fit.error, fit.bias) == (1, 0, 0)


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([0.1, -0.5], None, r"attention probabilities hold -0\.5: expected finite numbers"),
        ([0.1, 0.2], [1.0], r"shape \(2,\) and their weights \(1,\): expected \[n\]"),
        ([], None, "weights of 0 attention probabilities sum to 0"),
    ],
    ids=["negative", "lengths", "empty"],
)
def test_bad_samples_are_refused(values: list, weights: list | None, message: str) -> None:
    sample = torch.tensor(values), None if weights is None else torch.tensor(weights)
    with pytest.raises(StepQuantError, match=message):
        grid_fits(*sample, 4)


# The step.


def applied(tiny_session, grid="adaptive", before=(), **settings):
    """A session after the step, with three steps in two groups unless said."""
    session = tiny_session(attention=4, probabilities=3)
    for step in before:
        step.apply(session)
    AdaptiveSoftmax(grid=grid, **{"step_groups": 2, **settings}).apply(session)
    return session


def of_group(record):
    first, last = record["steps"]
    return slice(first, last + 1)


@pytest.mark.parametrize("grid", ["adaptive", "uniform", "log2", "error"])
def test_each_group_of_steps_gets_the_grid_that_was_asked_for(tiny_session, grid):
    session = applied(tiny_session, grid)
    summary = session.summary["adaptive_softmax"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    records = summary["groups"]
    assert sorted({record["attention"] for record in records}) == sorted(SITES)
    assert [record["steps"] for record in records] == [[0, 1], [2, 2]] * len(SITES)
    for record in records:
        lower = record["log2_error"] < record["uniform_error"]
        rule = record["likelihood_ratio"] > 0
        chosen = {"adaptive": rule, "uniform": False, "log2": True, "error": lower}[grid]
        assert record["log2"] == chosen
        assert record["test_agrees_with_error"] == (rule == lower)
        table = session.attention()[record["attention"]].probabilities
        assert table.log2[of_group(record)].tolist() == [chosen] * len(table.log2[of_group(record)])
        assert len(table.scale[of_group(record)].unique()) == 1
    assert summary["log2_share"] == sum(r["log2"] for r in records) / len(records)
    agreeing = sum(r["test_agrees_with_error"] for r in records)
    assert summary["agreement"] == agreeing / len(records)
    sample = session.trajectories.step(0, 2).sample
    with torch.no_grad():
        y = session.model(sample, session.trajectories.timesteps[0]).sample
    assert torch.isfinite(y).all()


def quantized(x, quantizer, row):
    """`x` on the affine grid of `row`, in float64."""
    scale = quantizer.scale[row].double()
    zero = quantizer.zero_point[row].round().double()
    codes = (torch.round(x.double() / scale) + zero).clamp(0, 2**quantizer.bits - 1)
    return (codes - zero) * scale


@torch.no_grad()
@pytest.mark.parametrize("grid", ["uniform", "log2"])
def test_the_summary_is_what_the_probabilities_say(tiny_session, monkeypatch, grid):
    """One group of two steps, from queries and keys as the model gives them, in float64."""
    everything = lambda flat, _: (flat, torch.ones_like(flat))  # noqa: E731
    monkeypatch.setattr(observe, "tails_and_draw", everything)  # not a random draw of it
    name, session = SITES[-1], tiny_session(attention=4, probabilities=3)
    session.ensure_ranges()
    products = session.attention()[name]
    seen = []

    def keep(_, args):
        query, key = (quantized(args[i], products.activation_quantizers[i], 0) for i in (0, 1))
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        seen.append(torch.softmax(scores, dim=-1).flatten())

    handle = products.register_forward_pre_hook(keep)
    for step in (0, 1):
        timestep = session.trajectories.timesteps[step]
        session.model(session.trajectories.step(step, 16).sample, timestep)
    handle.remove()
    p = torch.cat(seen)
    x_min = p.sort().values[math.ceil(len(p) / 2) - 1]
    tail = p[p >= x_min]
    log = torch.log(tail / x_min).mean()
    power_law = torch.log(1 / log / x_min) - (1 + 1 / log) * log
    exponential = -torch.log(tail.mean() - x_min) - 1

    AdaptiveSoftmax(grid=grid, step_groups=2).apply(session)
    record = next(
        r for r in session.summary["adaptive_softmax"]["groups"] if r["attention"] == name
    )
    assert record["steps"] == [0, 1]
    assert record["likelihood_ratio"] == pytest.approx(float(power_law - exponential), rel=1e-3)
    scale = session.attention()[name].probabilities.scale[0].double()
    if grid == "uniform":
        y = scale * torch.round(p / scale).clamp(max=7)
        tops = [float(p.max()) * factor / 7 for factor in FACTORS]
    else:
        codes = torch.round(-torch.log2(p / scale)).clamp(0, 7)
        y = torch.where(codes == 7, 0, scale * 2**-codes)
        tops = [float(p.max()) * factor for factor in FACTORS]
    assert min(abs(float(scale) / top - 1) for top in tops) < 1e-4
    assert record[f"{grid}_error"] == pytest.approx(float((y - p).square().mean()), rel=1e-3)
    bias = float(y.sum() / p.sum()) - 1
    assert record[f"{grid}_bias"] == pytest.approx(bias, abs=1e-3)


def test_static_tables_get_a_row_for_each_step(tiny_session):
    session = applied(tiny_session, "error", step_groups=3)
    for products in session.attention().values():
        tables = [quantizer for quantizer in products.activation_quantizers]
        assert [table.steps for table in (*tables, products.probabilities)] == [3] * 4
        for table in tables:
            assert len(table.scale.unique()) == len(table.zero_point.unique()) == 1
    assert all(layer.activation_quantizers[0].steps == 1 for layer in session.layers().values())


def test_tables_of_the_temporal_quantizer_stay(tiny_session):
    session = applied(tiny_session, before=[TemporalQuantizer()])
    other = tiny_session(attention=4, probabilities=3)
    TemporalQuantizer().apply(other)
    other.ensure_ranges()
    for name, products in session.attention().items():
        pairs = zip(
            products.activation_quantizers,
            other.attention()[name].activation_quantizers,
            strict=True,
        )
        for table, before in pairs:
            assert table.steps == 3 and len(table.scale.unique()) > 1
            assert torch.equal(table.scale, before.scale)


def test_more_groups_than_steps_are_one_for_each(tiny_session):
    session = applied(tiny_session, step_groups=50)
    records = session.summary["adaptive_softmax"]["groups"]
    assert [record["steps"] for record in records[:3]] == [[0, 0], [1, 1], [2, 2]]


def test_ranges_of_attention_cover_what_is_seen(tiny_session):
    """Before the step: minmax ranges, the whole table alike or step by step."""
    session = tiny_session(attention=4, probabilities=3)
    assert sorted(session.attention()) == sorted(SITES)
    session.ensure_ranges()
    for products in session.attention().values():
        assert products.quantizing
        assert not products.probabilities.log2.any()
        assert 0 < products.probabilities.scale.item() <= 1 / 7


def test_a_model_without_attention_is_told_and_stays_as_it_was(tiny_session, monkeypatch):
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    session = tiny_session(attention=4, probabilities=3, **plain, add_attention=False)
    session.ensure_ranges()
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    lines = []
    monkeypatch.setattr(session.reporter, "line", lines.append)
    AdaptiveSoftmax().apply(session)
    (line,) = lines
    assert line == "step 'adaptive_softmax' changes nothing: the model has no quantized attention"
    assert session.summary["adaptive_softmax"] == {"groups": []}
    after = session.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_step_wants_attention_bits():
    step = AdaptiveSoftmax()
    step.check(Scheme(attention_bits=8))
    with pytest.raises(StepQuantError, match="step 'adaptive_softmax' got a scheme that leaves"):
        step.check(Scheme())


@pytest.mark.parametrize(
    "settings",
    [{"step_groups": 0}, {"grid": "log"}, {"x_min_quantile": 1}, {"alternative": "normal"}],
    ids=str,
)
def test_settings_out_of_bounds_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AdaptiveSoftmax(**settings)
