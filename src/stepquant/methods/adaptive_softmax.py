"""Dynamically Adaptive Quantizer (DAQ): TCAQ-DM (AAAI 2025, arXiv 2412.16700), section on DAQ.

Attention's probabilities get a log2 grid at the steps where they follow a power law, and a uniform
one at the others.
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

# Factors of the largest value that a grid's upper end is searched over: six octaves down, and half
# an octave up, because the log2 grid may lie best with its upper end above all values.
FACTORS = [2.0 ** (0.5 - k / 16) for k in range(105)]


@dataclass(frozen=True)
class GridFit:
    """The best grid of a kind: its `scale`, mean squared `error`, and `bias`.

    `bias` is the sum of the quantized values over that of the values, less 1: how far rows that sum
    to 1 are off, in the mean. The scale is the uniform grid's step, the log2 grid's largest level.
    """

    scale: float
    error: float
    bias: float


def grid_fits(values: Tensor, weights: Tensor | None, bits: int) -> tuple[GridFit, GridFit]:
    """The best uniform and the best log2 grid of `bits` bits for `values [n]` with `weights [n]`.

    The scale is searched for the least mean squared error over `FACTORS` of the largest value; both
    grids have zero as a level. In float64.
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
    """Choose the grid of attention's probabilities, and search its scale, group by group of steps.

    `step_groups`: the steps are cut into so many groups of neighbours, each with one grid and scale
    (the paper's step groups, whose number it leaves open). `grid`: "adaptive" is the paper's test;
    "uniform" and "log2" take the same one everywhere, and "error" takes what has the lower squared
    error, to compare with. `alternative` to the power law and `x_min_quantile`, from which on the
    law is fitted: see `power_law.likelihood_ratio` and `power_law.tail_of`.

    The probabilities are those of the calibration samples, in the model as it is quantized so far.
    Tables of attention that have one row get a row for each step.
    """

    name = "adaptive_softmax"
    not_after: ClassVar[Mapping[str, str]] = CORRECTED
    step_groups: int = Field(10, ge=1)
    grid: Literal["adaptive", "uniform", "log2", "error"] = "adaptive"
    alternative: Alternative = "exponential"
    x_min_quantile: float = Field(X_MIN_QUANTILE, ge=0, lt=1)
    samples_per_step: int = Field(16, ge=1)

    def check(self, scheme: Scheme) -> None:
        """Probabilities must be quantized at all."""
        if scheme.attention_bits is None:
            raise StepQuantError(
                f"step '{self.name}' got a scheme that leaves attention's products float: expected "
                "scheme.attention_bits, such as 8"
            )

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Set all probability tables; the summary has every group's test and errors.

        A model without quantized attention stays as it is: a line says so.
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
        """Give the steps `rows` of `quantizer` their grid; what the test and the errors say."""
        values = torch.cat([observed.values[row] for row in rows.tolist()])
        weights = torch.cat([observed.weights[row] for row in rows.tolist()])
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
