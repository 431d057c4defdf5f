"""Stored sums of a data set's features: the state of torchmetrics' Fréchet distance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stepquant.support.errors import StepQuantError

SUM = "real_features_sum"  # [D]
OUTER_SUM = "real_features_cov_sum"  # [D, D], sum of f fᵀ, not centred
COUNT = "real_features_num_samples"  # []


def check_statistics(
    statistics: Mapping[str, Tensor], num_features: int, what: str = "the reference statistics"
) -> dict[str, Tensor]:
    """A float64 copy of `statistics`, after a look at every tensor in it.

    Args:
        statistics: `real_features_sum [D]`, `real_features_cov_sum [D, D]` (the sum of the outer
            products, not centred) and `real_features_num_samples []`; other keys are left out.
        num_features: D, the expected length of a feature vector.
        what: how an error calls them.

    Raises:
        StepQuantError: a tensor is missing, has another shape or values that are not finite, or
            there are fewer than two samples behind it.
    """
    shapes = {SUM: [num_features], OUTER_SUM: [num_features, num_features], COUNT: []}
    for name, shape in shapes.items():
        found = list(statistics[name].shape) if name in statistics else "missing"
        if found != shape:
            raise StepQuantError(
                f"'{name}' of {what} is {found}: expected shape {shape}; take statistics of the "
                "same features"
            )
        if not bool(statistics[name].isfinite().all()):
            raise StepQuantError(
                f"'{name}' of {what} has values that are not finite: collect the statistics anew"
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
