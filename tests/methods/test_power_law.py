from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from softmax_samples import normal, softmax, uniform
from stepquant.methods.power_law import (
    fit_exponential,
    fit_log_normal,
    fit_power_law,
    likelihood_ratio,
    prefers_log2,
    tail_of,
)
from stepquant.support.errors import StepQuantError


def pareto(alpha: float, count: int = 50_000, x_min: float = 0.01) -> Tensor:
    return x_min * (1 - uniform(count)) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.2, 2.0, 3.5])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9])
def test_alpha_of_a_pareto_sample_is_found(alpha: float, quantile: float) -> None:
    tail = tail_of(pareto(alpha), None, quantile)
    deviation = (alpha - 1) / math.sqrt(len(tail.logs))
    assert abs(fit_power_law(tail).alpha - alpha) < 4 * deviation
    assert prefers_log2(likelihood_ratio(tail))


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9])
def test_the_rate_of_an_exponential_sample_is_found(quantile: float) -> None:
    tail = tail_of(-0.02 * torch.log(1 - uniform(50_000)) + 0.003, None, quantile)
    assert fit_exponential(tail).rate == pytest.approx(50, rel=4 / math.sqrt(len(tail.logs)))
    for alternative in ("exponential", "best"):
        ratio = likelihood_ratio(tail, alternative)
        assert ratio < -0.001 and not prefers_log2(ratio)


@pytest.mark.parametrize(("mu", "sigma"), [(-6.0, 0.5), (-6.0, 2.0), (-9.0, 1.0)])
def test_a_truncated_log_normal_is_found(mu: float, sigma: float) -> None:
    fit = fit_log_normal(tail_of(torch.exp(mu + sigma * normal(200_000)), None, 0.2))
    assert fit.mu == pytest.approx(mu, abs=0.05 * sigma)
    assert fit.sigma == pytest.approx(sigma, rel=0.03)


def log_normal_likelihood(tail, mu: Tensor, sigma: Tensor) -> Tensor:
    """Mean log-density of values above `x_min`, for `mu` and `sigma` of any one shape."""
    x = (tail.x_min + tail.gaps)[:, None]
    z = (torch.log(x) - mu.flatten()) / sigma.flatten()
    density = -z.square() / 2 - torch.log(x * sigma.flatten()) - math.log(2 * math.pi) / 2
    kept = torch.special.log_ndtr((mu.flatten() - math.log(tail.x_min)) / sigma.flatten())
    return (tail.weights[:, None] * density).sum(dim=0).sub(kept).view(mu.shape)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.9])
def test_the_log_normal_is_the_best_of_brute_force(quantile: float) -> None:
    weights = uniform(500, 3)
    tail = tail_of(torch.exp(normal(500) - 5), weights, quantile)
    fit = fit_log_normal(tail)
    mu, sigma = torch.tensor(fit.mu).double(), torch.tensor(fit.sigma).double()
    assert fit.log_likelihood == pytest.approx(float(log_normal_likelihood(tail, mu, sigma)))
    around = torch.linspace(-1, 1, 41, dtype=torch.float64)
    for width in (1.0, 0.1, 0.01):
        others = log_normal_likelihood(
            tail,
            *torch.meshgrid(mu + width * around, sigma * torch.exp(width * around), indexing="ij"),
        )
        assert float(others.max()) <= fit.log_likelihood + 1e-9
        assert float(others.min()) < fit.log_likelihood - 1e-6


def test_log_likelihoods_are_those_of_the_densities() -> None:
    tail = tail_of(softmax(2), uniform(4096, 5), 0.3)
    x = tail.x_min + tail.gaps
    law, rate = fit_power_law(tail), fit_exponential(tail).rate
    power = math.log((law.alpha - 1) / tail.x_min) - law.alpha * torch.log(x / tail.x_min)
    assert law.log_likelihood == pytest.approx(tail.mean(power))
    exponential = math.log(rate) - rate * (x - tail.x_min)
    assert fit_exponential(tail).log_likelihood == pytest.approx(tail.mean(exponential))
    # Each density integrates to 1 from x_min on: in the logarithm, over 60 octaves.
    y = torch.linspace(0, 40, 200_001, dtype=torch.float64)
    for log_density in (
        math.log(law.alpha - 1) - (law.alpha - 1) * y,
        math.log(rate * tail.x_min) + y - rate * tail.x_min * torch.expm1(y),
    ):
        assert float(torch.trapezoid(torch.exp(log_density), y)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("sample", ["softmax-0.5", "softmax-2", "softmax-8", "pareto", "heavier"])
@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9])
def test_a_log_normal_is_never_less_likely_than_a_power_law(sample: str, quantile: float) -> None:
    """The trap of the alternative: the power law is a limit of the log-normal."""
    values = {
        "pareto": pareto(2.0),
        "heavier": torch.exp(normal(4096).abs().exp()),  # spread wider than any power law
    }.get(sample)
    if values is None:
        values = softmax(float(sample.removeprefix("softmax-")))
    tail = tail_of(values, None, quantile)
    law = fit_power_law(tail).log_likelihood
    assert fit_log_normal(tail).log_likelihood >= law
    for alternative in ("log_normal", "best"):
        assert not prefers_log2(likelihood_ratio(tail, alternative))
    if sample == "heavier":
        assert fit_log_normal(tail).log_likelihood == law
        assert fit_log_normal(tail).sigma == math.inf


def test_best_is_the_smaller_ratio() -> None:
    tail = tail_of(softmax(1))
    ratios = {name: likelihood_ratio(tail, name) for name in ("exponential", "log_normal", "best")}
    assert ratios["best"] == min(ratios["exponential"], ratios["log_normal"])


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_flat_softmaxes_are_uniform_and_sharp_ones_log2(quantile: float) -> None:
    flat, sharp = (tail_of(softmax(s), None, quantile) for s in (0.5, 4.0))
    assert likelihood_ratio(flat) < 0 < likelihood_ratio(sharp)


def test_weights_count_like_repeated_values() -> None:
    values, counts = softmax(2)[:300], torch.randint(1, 5, (300,), generator=torch.Generator())
    repeated = values.repeat_interleave(counts)
    for quantile in (0.0, 0.35, 0.8):
        ours, oracle = tail_of(values, counts, quantile), tail_of(repeated, None, quantile)
        assert ours.x_min == oracle.x_min
        for alternative in ("exponential", "log_normal"):
            assert likelihood_ratio(ours, alternative) == pytest.approx(
                likelihood_ratio(oracle, alternative)
            )


def test_x_min_is_a_value_of_the_sample() -> None:
    values = torch.tensor([0.4, 0.0, 0.1, 0.3, 0.2])  # zeros do not count
    found = [tail_of(values, None, quantile).x_min for quantile in (0, 0.25, 0.26, 0.5, 0.99)]
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.4])
    assert len(tail_of(values, None, 0.5).logs) == 3
    skewed = torch.tensor([1.0, 1, 8, 0, 0])  # 0.4 stands for one value, 0.1 for eight, others none
    assert tail_of(values, skewed, 0.5).x_min == pytest.approx(0.1)


samples = st.lists(st.floats(2.0**-40, 1.0, width=32), min_size=1, max_size=30)


@given(samples, st.floats(0, 0.99))
def test_invariants_of_the_ratio(values: list[float], quantile: float) -> None:
    tail = tail_of(torch.tensor(values), None, quantile)
    ratio = likelihood_ratio(tail)
    assert math.isfinite(ratio)
    assert fit_power_law(tail).alpha > 1 and fit_exponential(tail).rate > 0
    assert likelihood_ratio(tail, "log_normal") <= 0 and likelihood_ratio(tail, "best") <= 0
    unit = tail_of(torch.tensor(values) * 2.0**-7, None, quantile)
    assert likelihood_ratio(unit) == pytest.approx(ratio, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("count", [1, 2, 100])
def test_equal_values_prefer_nothing(count: int) -> None:
    tail = tail_of(torch.full((count,), 1 / 64))
    for alternative in ("exponential", "log_normal", "best"):
        assert likelihood_ratio(tail, alternative) == 0
    assert fit_power_law(tail).alpha == fit_exponential(tail).rate == math.inf
    assert fit_log_normal(tail).sigma == 0


def test_two_values() -> None:
    tail = tail_of(torch.tensor([0.1, 0.2]), None, 0.0)
    assert fit_power_law(tail).alpha == pytest.approx(1 + 2 / math.log(2))
    assert fit_exponential(tail).rate == pytest.approx(20)


def test_zeros_alone_follow_no_law() -> None:
    with pytest.raises(StepQuantError, match="hold none above 0 with a weight, of 5: expected one"):
        tail_of(torch.zeros(5))


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([0.1, -0.5], None, r"attention probabilities hold -0\.5: expected finite numbers"),
        ([0.1, math.nan], None, "attention probabilities hold nan: expected finite"),
        ([0.1, 0.2], [1.0, math.inf], "weights hold inf: expected finite"),
        ([0.1, 0.2], [1.0], r"shape \(2,\) and their weights \(1,\): expected \[n\]"),
        ([[0.1, 0.2]], None, r"shape \(1, 2\)"),
        ([0.1, 0.2], [0.0, 0.0], "weights of 2 attention probabilities sum to 0"),
        ([], None, "weights of 0 attention probabilities sum to 0"),
    ],
    ids=["negative", "nan", "inf-weight", "lengths", "two-dimensions", "no-weight", "empty"],
)
def test_bad_samples_are_refused(values: list, weights: list | None, message: str) -> None:
    sample = torch.tensor(values), None if weights is None else torch.tensor(weights)
    with pytest.raises(StepQuantError, match=message):
        tail_of(*sample)


@pytest.mark.parametrize("quantile", [-0.1, 1.0, math.nan])
def test_a_bad_quantile_is_refused(quantile: float) -> None:
    with pytest.raises(StepQuantError, match=f"quantile .* is {quantile}: expected 0 to below 1"):
        tail_of(torch.ones(3), None, quantile)


def test_an_unknown_alternative_is_refused() -> None:
    with pytest.raises(StepQuantError, match="'normal': expected one of exponential, log_normal"):
        likelihood_ratio(tail_of(softmax(1)), "normal")
