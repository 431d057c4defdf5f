"""Sigma-delta rounding: each weight takes over the rounding error of the one before it.

A first-order sigma-delta modulator (Inose, Yasuda and Murakami, 1962) along each row of a weight.
Single errors grow, but those of a row add up to half a step at most. An input with a large mean,
which multiplies exactly that sum, is shifted less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from stepquant import Comparison, Session, Step, register_metric, register_step

TRAINING = (
    "block_distillation",
    "block_reconstruction",
    "progressive_alignment",
    "trajectory_distillation",
    "relation_distillation",
    "outlier_mixed_bits",
    "low_rank_adapters",
)


def sigma_delta(q: Tensor, highest: Tensor, carry: float) -> Tensor:
    """Codes from 0 to `highest [C_out]`, whole numbers, for the unrounded codes `q [C_out, K]`.

    `carry`: share of each error that the next weight takes over. Where a code is cut off at the
    end of its grid, half a step is handed on at most.
    """
    rounded = torch.empty_like(q)
    error = torch.zeros_like(q[:, 0])
    for k in range(q.shape[1]):
        wanted = q[:, k] + carry * error
        rounded[:, k] = torch.minimum(wanted.round().clamp(min=0), highest)
        error = (wanted - rounded[:, k]).clamp(-0.5, 0.5)
    return rounded


@register_step
class SigmaDeltaRounding(Step):
    """Round all weights by `sigma_delta`.

    `carry`: share of each rounding error that the next weight takes over; 0 rounds to the nearest.
    """

    name = "sigma_delta_rounding"
    not_after: ClassVar[Mapping[str, str]] = {
        "bias_correction": "which corrects the errors of all steps before it",
        "affine_distillation": "which compensates for the errors of all steps before it",
    }
    # Steps of stepquant cannot name this one in their `not_after`.
    not_before: ClassVar[Mapping[str, str]] = dict.fromkeys(
        TRAINING, "which has rounded the weights that it would change"
    )
    carry: float = Field(1.0, ge=0.0, le=1.0)

    @torch.no_grad()
    def apply(self, session: Session) -> None:
        """Round all weights; the summary has the share that is not at its nearest code."""
        session.ensure_ranges()
        moved = count = 0
        for layer in session.layers().values():
            layer.merge_adapter()
            parts = []
            for _, quantizer, weight in layer.parts():
                scale, zero_point, bits = quantizer.rows(weight.dim())
                q = (weight / scale + zero_point).flatten(1)
                codes = sigma_delta(q, 2.0 ** bits.flatten() - 1, self.carry).view_as(weight)
                moved += int((codes != quantizer.codes(weight)).sum())
                count += weight.numel()
                parts.append((codes - zero_point) * scale)
            layer.weight.copy_(torch.cat(parts, dim=1))
        session.summary[self.name] = {"moved_share": moved / count}


@register_metric("brightness_shift", key="brightness_shift", better="lower")
def brightness_shift(
    images: Tensor, float_images: Tensor, comparison: Comparison
) -> dict[str, Any]:
    """Mean over pairs of how much brighter or darker an image is, images in [0, 1]."""
    shift = images.flatten(1).mean(dim=1) - float_images.flatten(1).mean(dim=1)  # [N]
    return {"brightness_shift": float(shift.abs().mean())}
