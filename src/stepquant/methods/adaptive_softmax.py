"""Dynamically Adaptive Quantizer (DAQ) of TCAQ-DM (arXiv 2412.16700, AAAI 2025), section on DAQ.

For each post-softmax tensor and each group of sampling steps, `R` is the log-likelihood ratio of a
power law against an alternative distribution (`methods.power_law`). It chooses the grid:

    R > 0:   log2     q = clip(round(-log2(x / s)), 0, 2^b - 1)    x̂ = s 2^-q, 0 for the largest q
    R <= 0:  uniform  q = clip(round(x / s), 0, 2^b - 1)           x̂ = s q

Deviation: the printed log2 grid has no zero; here its largest code stands for 0.

The paper leaves open the number of step groups and the smallest value of the fit, and its
alternative distribution is not known to us. All three are settings. The scale `s` of each grid is
searched for the least mean squared error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepquant.calibration.observe import Observation, observe_probabilities
from stepquant.methods.power_law import (
    X_MIN_QUANTILE,
    Alternative,
    checked_sample,
    likelihood_ratio,
    prefers_log2,
    tail_of,
)
from stepquant.methods.session import Session
from stepquant.methods.step import CORRECTED, Step, register_step
from stepquant.numerics import dequantize, dequantize_log2, max_code, quantize, quantize_log2
from stepquant.quantizers import ProbabilityQuantizer
from stepquant.simulation.scheme import Scheme
from stepquant.support.errors import StepQuantError

# Candidates for a grid's upper end, as factors of the largest value: six octaves down, and half an
# octave up, because the best log2 grid may have its upper end above all values.
FACTORS = [2.0 ** (0.5 - k / 16) for k in range(105)]


@dataclass(frozen=True)
class GridFit:
    """The best grid of one kind for a sample of probabilities.

    Attributes:
        scale: Step of the uniform grid, or largest level of the log2 grid.
        error: Weighted mean squared error.
        bias: Sum of the quantized values over the sum of the values, minus 1: the mean relative
            error of row sums, which should be 1.
    """

    scale: float
    error: float
    bias: float


def grid_fits(values: Tensor, weights: Tensor | None, bits: int) -> tuple[GridFit, GridFit]:
    """Search the best uniform and the best log2 grid for a sample of probabilities.

    Of `FACTORS` times the largest value, the upper end with the least weighted mean squared error
    wins. Both grids have 0 as a level. Computed in float64.

    Args:
        values: Probabilities, `[n]`.
        weights: How many values each entry stands for, `[n]`; None weights all equally.
        bits: Bits of a code.

    Returns:
        `(uniform, log2)`. If all values are 0, both have scale 1 and error 0.

    Raises:
        StepQuantError: Shapes differ, an entry is negative or not finite, or all weights are 0.
    """
    values, weights = checked_sample(values, weights)
    top = float(values.max())
    if top == 0:
        return GridFit(1.0, 0.0, 0.0), GridFit(1.0, 0.0, 0.0)
    total, zero = float((weights * values).sum()), values.new_zeros(())
    fits: list[list[GridFit]] = [[], []]
    for factor in FACTORS:
        step = values.new_tensor(top * factor / max_code(bits))
        uniform = dequantize(quantize(values, step, zero, bits), step, zero)
        level = values.new_tensor(top * factor)
        log2 = dequantize_log2(quantize_log2(values, level, bits), level, bits)
        for found, scale, quantized in ((fits[0], step, uniform), (fits[1], level, log2)):
            error = float((weights * (quantized - values).square()).sum())
            bias = float((weights * quantized).sum()) / total - 1 if total else 0.0
            found.append(GridFit(float(scale), error, bias))
    best_uniform, best_log2 = (min(found, key=lambda fit: fit.error) for found in fits)
    return best_uniform, best_log2


@register_step
class AdaptiveSoftmax(Step):
    """Choose grid and scale of attention's probabilities for each group of steps.

    The probabilities are those of the calibration samples, in the model as it is quantized so far.
    Attention tables with one row get a row for each step.

    Attributes:
        step_groups: Number of groups. Each consists of neighbouring steps and has one grid and one
            scale.
        grid: "adaptive" applies the paper's test. For comparison, "uniform" and "log2" take one
            grid everywhere, and "error" takes the grid with the lower squared error.
        alternative: Distribution that the power law is tested against, see
            `power_law.likelihood_ratio`.
        x_min_quantile: Quantile from which on the power law is fitted, see `power_law.tail_of`.
        samples_per_step: Images whose probabilities are observed at each step.
    """

    name = "adaptive_softmax"
    not_after: ClassVar[Mapping[str, str]] = CORRECTED
    step_groups: int = Field(10, ge=1)
    grid: Literal["adaptive", "uniform", "log2", "error"] = "adaptive"
    alternative: Alternative = "exponential"
    x_min_quantile: float = Field(X_MIN_QUANTILE, ge=0, lt=1)
    samples_per_step: int = Field(16, ge=1)

    def check(self, scheme: Scheme) -> None:
        """Check that the scheme quantizes probabilities.

        Raises:
            StepQuantError: The scheme has no `attention_bits`.
        """
        if scheme.attention_bits is None:
            raise StepQuantError(
                f"step '{self.name}' got a scheme that leaves attention's products float: expected "
                "scheme.attention_bits, such as 8"
            )

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Set all probability tables; the summary has the test and the errors of every group.

        A model without quantized attention stays as it is, and the reporter says so.
        """
        session.ensure_ranges()
        steps = len(session.context.grid)
        attention = session.attention()
        if not attention:
            session.reporter.line(
                f"step '{self.name}' changes nothing: the model has no quantized attention"
            )
            session.summary[self.name] = {"groups": []}
            return
        observed = observe_probabilities(
            session.model,
            attention,
            session.trajectories,
            self.samples_per_step,
            session.seed,
            session.reporter,
        )
        groups = torch.arange(steps).tensor_split(min(self.step_groups, steps))
        records = []
        with session.reporter.task("choosing softmax grids", total=len(attention)) as task:
            for name, module in attention.items():
                if module.probabilities.steps != steps:
                    module.resize(steps)
                for rows in groups:
                    record = self._choose(module.probabilities, observed[name], rows)
                    records.append({"attention": name, **record})
                task.advance(note=name)
        agreeing = [record["test_agrees_with_error"] for record in records]
        session.summary[self.name] = {
            "groups": records,
            "log2_share": sum(record["log2"] for record in records) / len(records),
            "agreement": sum(agreeing) / len(agreeing),
        }

    def _choose(
        self, quantizer: ProbabilityQuantizer, observed: Observation, rows: Tensor
    ) -> dict[str, Any]:
        """Set the grid of the steps `rows` of `quantizer`, and return the record of the group."""
        values = torch.cat([observed.values[row] for row in rows.tolist()])
        weights = torch.cat([observed.weights[row] for row in rows.tolist()])
        values, weights = values[weights > 0], weights[weights > 0]  # without what fills short rows
        ratio = likelihood_ratio(tail_of(values, weights, self.x_min_quantile), self.alternative)
        uniform, log2 = grid_fits(values, weights, quantizer.bits)
        lower_error = log2.error < uniform.error
        chosen = {
            "adaptive": prefers_log2(ratio),
            "uniform": False,
            "log2": True,
            "error": lower_error,
        }[self.grid]
        quantizer.log2[rows] = chosen
        quantizer.scale[rows] = (log2 if chosen else uniform).scale
        return {
            "steps": [int(rows[0]), int(rows[-1])],
            "likelihood_ratio": ratio,
            "log2": chosen,
            "uniform_error": uniform.error,
            "log2_error": log2.error,
            "uniform_bias": uniform.bias,
            "log2_bias": log2.bias,
            "test_agrees_with_error": prefers_log2(ratio) == lower_error,
        }
