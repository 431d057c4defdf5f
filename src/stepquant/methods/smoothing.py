"""Activation smoothing of SmoothQuant (Xiao et al., ICML 2023), section 4, equation 4.

Equivalent scaling, `Y = (X / s) (s W)`, with one factor for each in-channel `j`:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

`max|X_j|` is taken over all steps. Unlike Weight Dilation, smoothing moves the weight ranges, and
`s_j` may be below 1. A channel that is zero on either side gets 1.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stepquant.methods.equivalent_scaling import ScalingStep, apply_scaling
from stepquant.methods.session import Session
from stepquant.methods.step import register_step


def smoothing_factors(W: Tensor, X_max: Tensor, alpha: float) -> Tensor:
    """Factors `s[j] = max|X_j|^alpha / max|W_j|^(1 - alpha)`, `[C_in]`.

    A channel whose activations or weights are all zero gets 1.

    Args:
        W: Weight, `[C_out, C_in, ...]`.
        X_max: Largest magnitude of each in-channel, `[C_in]`.
        alpha: Share of the difficulty that moves from activations to weights, 0 to 1.
    """
    W_max = W.flatten(2).abs().amax(dim=(0, 2)) if W.dim() > 2 else W.abs().amax(dim=0)
    s = X_max.pow(alpha) / W_max.pow(1 - alpha)
    return torch.where((X_max > 0) & (W_max > 0), s, torch.ones_like(s))


@register_step
class Smoothing(ScalingStep):
    """Balance activation and weight ranges per in-channel, for comparison with Weight Dilation.

    Attributes:
        alpha: Share of the difficulty that moves from activations to weights, 0 to 1.
        fold: See `ScalingStep`.
    """

    name = "smoothing"
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    fold: bool = True

    def apply(self, session: Session) -> None:
        """Scale all layers; the summary has the range change of each input part.

        Raises:
            StepQuantError: An earlier step has initialised the ranges.
        """
        session.require_no_ranges(self.name)
        session.summary[self.name] = apply_scaling(
            session,
            lambda W, p: smoothing_factors(W, p.amax(dim=0), self.alpha),
            fold=self.fold,
        )
