"""Maximum-likelihood test for a power law (Clauset, Shalizi and Newman 2009).

The Dynamically Adaptive Quantizer of TCAQ-DM (arXiv 2412.16700, AAAI 2025) applies it to
attention's probabilities. Values that spread over decades suit a log2 grid, others a uniform one:

    alpha = 1 + n / sum ln(x / x_min)
    R = (L(power law) - L(alternative)) / n        log2 where R > 0

`L` is the log-likelihood of the `n` values from `x_min` on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stepquant.support.errors import StepQuantError

Alternative = Literal["exponential", "log_normal", "best"]

# The median. From the smallest value on, the bulk of small probabilities would dominate the fit,
# and that is no power law.
X_MIN_QUANTILE = 0.5
# Bounds of the bisection, as a truncated normal's mean over its deviation. At the lower bound it is
# practically an exponential distribution, at the upper one a point.
MIN_RATIO, MAX_RATIO = -1e3, 1e6


@dataclass(frozen=True)
class Tail:
    """The values from `x_min` on, in the form that the fits need: float64 `[n]`.

    Attributes:
        x_min: Smallest value of the tail.
        gaps: `x - x_min`.
        logs: `ln(x / x_min)`, accurate near `x_min` too.
        weights: Share of each value; they sum to 1.
    """

    x_min: float
    gaps: Tensor
    logs: Tensor
    weights: Tensor

    def mean(self, values: Tensor) -> float:
        """The weighted mean of `values [n]`."""
        return float((self.weights * values).sum())


@dataclass(frozen=True)
class PowerLaw:
    """Fit of the density `(alpha - 1) / x_min * (x / x_min)^-alpha`.

    `log_likelihood` is the mean over the values.
    """

    alpha: float
    log_likelihood: float


@dataclass(frozen=True)
class Exponential:
    """Fit of the density `rate * exp(-rate * (x - x_min))`.

    `log_likelihood` is the mean over the values.
    """

    rate: float
    log_likelihood: float


@dataclass(frozen=True)
class LogNormal:
    """Fit of a log-normal: `ln x` is normal with `mu` and `sigma`, given `x >= x_min`.

    `log_likelihood` is the mean over the values. Where the best log-normal is its limit, a power
    law, `mu` is minus infinity and `sigma` infinity.
    """

    mu: float
    sigma: float
    log_likelihood: float


def checked_sample(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check a weighted sample and return it in float64, with weights that sum to 1.

    Args:
        values: Probabilities, `[n]`.
        weights: How many values each entry stands for, `[n]`; None weights all equally.

    Raises:
        StepQuantError: Shapes differ, an entry is negative or not finite, or all weights are 0.
    """
    values = values.detach().double()
    weights = torch.ones_like(values) if weights is None else weights.detach().double()
    if values.dim() != 1 or values.shape != weights.shape:
        raise StepQuantError(
            f"attention probabilities have shape {tuple(values.shape)} and their weights "
            f"{tuple(weights.shape)}: expected [n] for both"
        )
    for name, tensor in (("attention probabilities", values), ("weights", weights)):
        odd = tensor[~torch.isfinite(tensor) | (tensor < 0)]
        if odd.numel():
            raise StepQuantError(f"{name} hold {float(odd[0])}: expected finite numbers >= 0")
    if not weights.sum() > 0:
        raise StepQuantError(
            f"weights of {values.numel()} attention probabilities sum to 0: expected more than 0"
        )
    return values, weights / weights.sum()


def tail_of(
    values: Tensor, weights: Tensor | None = None, quantile: float = X_MIN_QUANTILE
) -> Tail:
    """The tail of a sample: its values from `x_min` on.

    `x_min` is a quantile of the values above 0: the smallest value with at least that share of the
    weight at or below it. Exact zeros are left out, because no power law has any. The paper leaves
    `x_min` open. Clauset's own choice, the `x_min` with the least Kolmogorov-Smirnov distance, may
    keep only a handful of values, while the grid has to serve all.

    Args:
        values: Probabilities, `[n]`.
        weights: How many values each entry stands for, `[n]`; None weights all equally.
        quantile: From 0 (the smallest value above 0) to below 1.

    Raises:
        StepQuantError: The quantile is out of range, the sample is invalid (`checked_sample`), or
            no value above 0 has a weight.
    """
    if not 0 <= quantile < 1:
        raise StepQuantError(
            f"quantile of the smallest value of the tail is {quantile}: expected 0 to below 1"
        )
    values, weights = checked_sample(values, weights)
    present = (values > 0) & (weights > 0)
    if not present.any():
        raise StepQuantError(
            f"attention probabilities hold none above 0 with a weight, of {values.numel()}: "
            "expected one at least"
        )
    values, order = values[present].sort()
    weights = weights[present][order]
    shares = weights.cumsum(0) / weights.sum()
    first = int(torch.searchsorted(shares, quantile - 1e-12).clamp(max=len(values) - 1))
    x_min = float(values[first])
    keep = values >= x_min
    gaps, weights = values[keep] - x_min, weights[keep]
    return Tail(x_min, gaps, torch.log1p(gaps / x_min), weights / weights.sum())


def fit_power_law(tail: Tail) -> PowerLaw:
    """Maximum likelihood: `alpha = 1 + n / sum ln(x / x_min)` (Clauset et al. 2009, equation 3.1).

    If all values equal `x_min`, alpha and the likelihood are infinite.
    """
    mean_log = tail.mean(tail.logs)
    if mean_log == 0:
        return PowerLaw(math.inf, math.inf)
    likelihood = -math.log(mean_log) - 1 - math.log(tail.x_min) - mean_log
    return PowerLaw(1 + 1 / mean_log, likelihood)


def fit_exponential(tail: Tail) -> Exponential:
    """Maximum likelihood: `rate = 1 / (mean(x) - x_min)`.

    If all values equal `x_min`, the rate and the likelihood are infinite.
    """
    mean_gap = tail.mean(tail.gaps)
    if mean_gap == 0:
        return Exponential(math.inf, math.inf)
    return Exponential(1 / mean_gap, -math.log(mean_gap) - 1)


def _erfcx(x: float) -> float:
    """`exp(x^2) erfc(x)`."""
    return float(torch.special.erfcx(torch.tensor(x, dtype=torch.float64)))


def _scaled_mean(ratio: float) -> tuple[float, float]:
    """Mean and mean square of a normal (mean `ratio`, deviation 1) that is truncated below zero."""
    mean = ratio + math.sqrt(2 / math.pi) / _erfcx(-ratio / math.sqrt(2))
    return mean, 1 + ratio * mean


def fit_log_normal(tail: Tail) -> LogNormal:
    """Maximum likelihood of a log-normal that is truncated, and normalised, at `x_min`.

    `ln(x / x_min)` is then a normal truncated below zero. Maximum likelihood matches its first two
    moments to the sample's. Its `mean square / mean^2` depends only on the normal's mean over its
    deviation and falls with it, from 2 to 1: one equation, which bisection solves. At 2 and beyond
    there is no maximum: the likelihood grows towards the limit of an exponential distribution of
    the logarithm. That limit is the power law, and its likelihood is returned.
    """
    mean_log = tail.mean(tail.logs)
    if mean_log == 0:
        return LogNormal(math.log(tail.x_min), 0.0, math.inf)
    target = tail.mean(tail.logs.square()) / mean_log**2
    limit = fit_power_law(tail).log_likelihood

    def above(ratio: float) -> bool:
        mean, square = _scaled_mean(ratio)
        return square / mean**2 > target

    if not above(MIN_RATIO):
        return LogNormal(-math.inf, math.inf, limit)
    if above(MAX_RATIO):
        return LogNormal(math.log(tail.x_min) + mean_log, 0.0, math.inf)
    low, high = MIN_RATIO, MAX_RATIO
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) else (low, middle)
    ratio = (low + high) / 2
    mean, _ = _scaled_mean(ratio)
    if ratio < 0:  # log of the share that truncation keeps; its term ratio^2 / 2 goes into `rest`
        kept, rest = math.log(_erfcx(-ratio / math.sqrt(2)) / 2), ratio * mean / 2
    else:
        kept = float(torch.special.log_ndtr(torch.tensor(ratio, dtype=torch.float64)))
        rest = ratio * (mean - ratio) / 2
    density = math.log(mean / mean_log) - (math.log(2 * math.pi) + 1) / 2 + rest - kept
    sigma = mean_log / mean
    mu = math.log(tail.x_min) + ratio * sigma
    likelihood = density - math.log(tail.x_min) - mean_log
    return LogNormal(mu, sigma, max(likelihood, limit))  # rounding may fall below the limit


def likelihood_ratio(tail: Tail, alternative: Alternative = "exponential") -> float:
    """`R`: mean log-likelihood of a value under a power law minus that under `alternative`.

    `R` does not depend on the unit of the values. If all values are equal, it is 0.

    `exponential` is the default, and the only alternative that the test can refute. A log-normal
    truncated at `x_min` has the power law as a limit, so `R <= 0` for all values: with
    `log_normal`, or `best` (the better of both), `prefers_log2` is never true. The paper's printed
    choice is not known to us.

    Raises:
        StepQuantError: `alternative` is unknown.
    """
    if alternative not in get_args(Alternative):
        raise StepQuantError(
            f"alternative to the power law is {alternative!r}: expected one of "
            f"{', '.join(get_args(Alternative))}"
        )
    if tail.mean(tail.logs) == 0:
        return 0.0
    others = []
    if alternative != "log_normal":
        others.append(fit_exponential(tail).log_likelihood)
    if alternative != "exponential":
        others.append(fit_log_normal(tail).log_likelihood)
    return fit_power_law(tail).log_likelihood - max(others)


def prefers_log2(ratio: float) -> bool:
    """The paper's rule: log2 where the power law is more likely (`R > 0`), else uniform."""
    return ratio > 0
