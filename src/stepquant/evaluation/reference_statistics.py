"""Stored statistics of a data set's features, as torchmetrics' Fréchet distance keeps them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepquant.support.errors import StepQuantError

SUM = "real_features_sum"  # [D]
OUTER_SUM = "real_features_cov_sum"  # [D, D], sum of f fᵀ, not centered
COUNT = "real_features_num_samples"  # []


def check_statistics(
    statistics: Mapping[str, Tensor], num_features: int, what: str = "the reference statistics"
) -> dict[str, Tensor]:
    """Check `statistics` and copy them: sums to float64, the count to int64, both on the CPU.

    Args:
        statistics: `real_features_sum [D]`, `real_features_cov_sum [D, D]` (the sum of the outer
            products, not centered) and `real_features_num_samples []`; other keys are dropped.
        num_features: D, the expected length of a feature vector.
        what: the name of the statistics in errors.

    Raises:
        StepQuantError: a tensor is missing, has another shape or values that are not finite, or the
            statistics cover fewer than two samples.
    """
    shapes = {SUM: [num_features], OUTER_SUM: [num_features, num_features], COUNT: []}
    for name, shape in shapes.items():
        found = list(statistics[name].shape) if name in statistics else "missing"
        if found != shape:
            raise StepQuantError(
                f"'{name}' of {what} is {found}: expected shape {shape}; use statistics of the "
                "same features"
            )
        if not bool(statistics[name].isfinite().all()):
            raise StepQuantError(
                f"'{name}' of {what} has values that are not finite: expected finite sums; compute "
                "the statistics again"
            )
    if int(statistics[COUNT]) < 2:
        raise StepQuantError(
            f"'{COUNT}' of {what} is {int(statistics[COUNT])}: expected two samples or more"
        )
    return {
        SUM: statistics[SUM].detach().cpu().to(torch.float64, copy=True),
        OUTER_SUM: statistics[OUTER_SUM].detach().cpu().to(torch.float64, copy=True),
        COUNT: statistics[COUNT].detach().cpu().to(torch.int64, copy=True),
    }
