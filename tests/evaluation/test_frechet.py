import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.evaluation import frechet_distance, frechet_distance_interval, frechet_metric
from stepquant.support.errors import StepQuantError


def draw(count, width, seed, mean=0.0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, dtype=torch.float64, generator=generator)
    mix = torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(
        width, width, dtype=torch.float64, generator=generator
    )
    return rows @ mix * spread + mean


def root(matrix):
    """The symmetric square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def oracle(a, b):
    """The distance by symmetric square roots alone: tr sqrt(A^1/2 B A^1/2), no torchmetrics."""
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.atleast_2d(torch.cov(rows.T)) for rows in (a, b))
    half = root(cov_a)
    mixed = root(half @ cov_b @ half).trace()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return float(means + cov_a.trace() + cov_b.trace() - 2 * mixed)


def whiten(rows):
    """Rows moved so that their sample mean is 0 and their sample covariance the identity."""
    rows = rows - rows.mean(0)
    factor = torch.linalg.cholesky(torch.cov(rows.T))
    return torch.linalg.solve_triangular(factor, rows.T, upper=False).T


def statistics_of(rows):
    metric = frechet_metric(rows.shape[1])
    metric.update(rows, real=True)
    return {n: v for n, v in metric.state_dict().items() if n.startswith("real_")}


@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (2.0, 0.5), (-1.0, 3.0)])
def test_matches_the_oracle(width, mean, spread):
    a, b = draw(300, width, 0), draw(200, width, 1, mean, spread)
    assert frechet_distance(a, b) == pytest.approx(oracle(a, b), rel=1e-9)


def test_diagonal_gaussians_have_the_closed_form():
    mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.0, 1.0, 0.5])
    dev_a, dev_b = torch.tensor([1.0, 2.0, 0.1]), torch.tensor([3.0, 2.0, 0.4])
    a = whiten(draw(100, 3, 0)) * dev_a + mean_a
    b = whiten(draw(80, 3, 1)) * dev_b + mean_b
    # |mean difference|^2 + sum (dev_a - dev_b)^2 = (1 + 9 + 0) + (4 + 0 + 0.09)
    assert frechet_distance(a, b) == pytest.approx(14.09, rel=1e-6)


def test_two_points_by_hand():
    # Means 0 and 3; unbiased variances 2 and 8: 9 + (sqrt 8 - sqrt 2)^2 = 11.
    distance = frechet_distance(torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]]))
    assert distance == pytest.approx(11.0, rel=1e-12)


def test_stored_statistics_equal_the_features():
    a, b = draw(300, 5, 0).float(), draw(200, 5, 1, 0.3).float()
    state = statistics_of(b)
    before = {name: value.clone() for name, value in state.items()}
    assert frechet_distance(a, state) == frechet_distance(a, b)
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_float32_features_are_summed_in_float64():
    a, b = draw(2000, 4, 0, mean=1000.0).float(), draw(2000, 4, 1, mean=1000.1).float()
    assert frechet_distance(a, b) == pytest.approx(oracle(a, b), rel=1e-6)


@given(
    seed=st.integers(0, 1000), width=st.integers(1, 6), shift=st.floats(-3, 3), c=st.floats(0.1, 4)
)
@settings(max_examples=25, deadline=None)
def test_invariants(seed, width, shift, c):
    a, b = draw(40, width, seed), draw(50, width, seed + 1, 0.5)
    distance = frechet_distance(a, b)
    assert distance >= 0
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-6, abs=1e-9)
    assert frechet_distance(a + shift, b + shift) == pytest.approx(distance, rel=1e-6, abs=1e-9)
    assert frechet_distance(a * c, b * c) == pytest.approx(distance * c**2, rel=1e-6, abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-7)


def test_interval_holds_the_point_and_is_the_same_for_a_seed():
    a, b = draw(200, 4, 0, 0.4), statistics_of(draw(500, 4, 1))
    first = frechet_distance_interval(a, b, seed=3)
    assert first == frechet_distance_interval(a, b, seed=3)
    assert first != frechet_distance_interval(a, b, seed=4)
    low, high = first
    assert 0 <= low < frechet_distance(a, b) < high


@given(seed=st.integers(0, 1000), count=st.integers(8, 60), level=st.floats(0.01, 0.99))
@settings(max_examples=20, deadline=None)
def test_interval_always_holds_the_point(seed, count, level):
    # Few samples of many features: here the plain percentiles lie far above the point.
    a, b = draw(count, 7, seed), draw(100, 7, seed + 1)
    low, high = frechet_distance_interval(a, b, resamples=10, seed=seed, level=level)
    assert 0 <= low <= frechet_distance(a, b) <= high


def test_interval_widens_with_the_level_and_narrows_with_the_samples():
    a, b = draw(800, 3, 0, 0.5), draw(500, 3, 1)

    def width(rows, level):
        low, high = frechet_distance_interval(rows, b, resamples=100, level=level)
        return high - low

    assert width(a, 0.5) < width(a, 0.95)
    assert width(a, 0.95) < width(a[:50], 0.95)


def test_interval_covers_the_expected_distance_at_that_sample_count():
    mean, reference = torch.tensor([0.8, 0.0, 0.0]), draw(4000, 3, 99)

    def fresh(seed):
        rows = torch.randn(120, 3, generator=torch.Generator().manual_seed(seed))
        return rows.double() + mean

    state = statistics_of(reference)
    expected = sum(frechet_distance(fresh(seed), state) for seed in range(1000, 1300)) / 300
    held = 0
    for seed in range(60):
        low, high = frechet_distance_interval(fresh(seed), state, resamples=60, level=0.9)
        held += low <= expected <= high
    assert 48 <= held <= 60  # 54 on average if exact; four standard deviations are 9


@pytest.mark.parametrize("count", [3, 4])
def test_too_few_samples_for_a_full_covariance_are_told(count):
    with pytest.warns(UserWarning, match=f"features are {count} samples of 4 features"):
        frechet_distance(draw(count, 4, 0), draw(50, 4, 1))


def test_enough_samples_are_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(draw(5, 4, 0), draw(50, 4, 1)) > 0


GOOD = draw(20, 3, 0)
SPOILT = GOOD.clone()
SPOILT[4, 1] = torch.nan


@pytest.mark.parametrize(
    ("features", "reference", "message"),
    [
        pytest.param(GOOD[0], GOOD, r"features are .* \[3\]: expected .* \[N, D\]", id="a vector"),
        pytest.param(GOOD.long(), GOOD, r"features are torch\.int64", id="integers"),
        pytest.param(GOOD[:1], GOOD, r"\[1, 3\]: expected at least two rows", id="one sample"),
        pytest.param(SPOILT, GOOD, "not finite in 1 of 20 rows", id="nan"),
        pytest.param(GOOD, SPOILT, "reference features have values", id="nan in the reference"),
        pytest.param(GOOD, GOOD[:, :2], "length 2: expected 3", id="other features"),
        pytest.param(GOOD, statistics_of(GOOD[:, :2]), r"expected shape \[3\]", id="other state"),
        pytest.param(GOOD, {}, "'real_features_sum' .* is missing", id="an empty state"),
    ],
)
@pytest.mark.parametrize("function", [frechet_distance, frechet_distance_interval])
def test_bad_features(function, features, reference, message):
    with pytest.raises(StepQuantError, match=message):
        function(features, reference)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"resamples": 9}, "resamples is 9: expected ten or more"),
        ({"level": 1.0}, r"level is 1\.0: expected a share"),
        ({"level": 95}, "level is 95: expected a share"),
    ],
)
def test_bad_interval_settings(settings_, message):
    with pytest.raises(StepQuantError, match=message):
        frechet_distance_interval(GOOD, GOOD, **settings_)
