"""Activation smoothing: SmoothQuant (Xiao et al., ICML 2023), section 4, equation 4."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stepquant.methods.equivalent_scaling import ScalingStep, apply_scaling
from stepquant.methods.session import Session
from stepquant.methods.step import register_step


def smoothing_factors(W: Tensor, X_max: Tensor, alpha: float) -> Tensor:
    """Factors `s[j] = max|X_j|^alpha / max|W_j|^(1 - alpha)`, `[C_in]`.

    `W [C_out, C_in, ...]`, `X_max [C_in]` the largest magnitude of each input channel. A channel
    that is zero on either side gets 1.
    """
    W_max = W.flatten(2).abs().amax(dim=(0, 2)) if W.dim() > 2 else W.abs().amax(dim=0)
    s = X_max.pow(alpha) / W_max.pow(1 - alpha)
    return torch.where((X_max > 0) & (W_max > 0), s, torch.ones_like(s))


@register_step
class Smoothing(ScalingStep):
    """Balance activation and weight ranges per in-channel, for comparison with Weight Dilation.

    `alpha`: how much of the difficulty moves from activations to weights. `fold`: see
    `ScalingStep`.
    """

    name = "smoothing"
    alpha: float = Field(0.5, ge=0.0, le=1.0)
    fold: bool = True

    def apply(self, session: Session) -> None:
        """Scale all layers; the summary has the range change per layer."""
        session.require_no_ranges(self.name)
        session.summary[self.name] = apply_scaling(
            session,
            lambda W, p: smoothing_factors(W, p.amax(dim=0), self.alpha),
            fold=self.fold,
        )
