"""Weight Dilation (WD): DilateQuant, arXiv 2409.14307, section 4.1.

An in-channel whose weights reach no out-channel's extreme can be scaled up until one does. The
weight ranges stay exactly as they are, so the weight error does not grow, and the activation that
the channel multiplies shrinks by the same factor.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stepquant.methods.equivalent_scaling import ScalingStep, apply_scaling
from stepquant.methods.session import Session
from stepquant.methods.step import register_step


def dilation_factors(W: Tensor, max_factor: float) -> Tensor:
    """Factors `s >= 1`, `[C_in]`, that leave each out-channel's minimum and maximum where they are.

    `W [C_out, C_in, ...]`. With `W_max[o] >= 0 >= W_min[o]` the extremes of out-channel `o` (the
    affine grid contains zero), `s[k] = min over (o, taps)` of `W_max[o] / W[o, k]` where the weight
    is positive and of `W_min[o] / W[o, k]` where it is negative (equations 10 to 12).

    Deviations: the ratio is taken only where the weight has the sign in question (as printed, a
    zero weight divides by zero and a positive one gives minus infinity); an in-channel of zeros
    gets 1; `s` is at most `max_factor`.
    """
    W = W.flatten(2) if W.dim() > 2 else W.unsqueeze(2)  # [C_out, C_in, taps]
    W_max = W.amax(dim=(1, 2), keepdim=True).clamp(min=0)
    W_min = W.amin(dim=(1, 2), keepdim=True).clamp(max=0)
    infinite = torch.full_like(W, torch.inf)
    s_1 = torch.where(W > 0, W_max / W, infinite).amin(dim=(0, 2))
    s_2 = torch.where(W < 0, W_min / W, infinite).amin(dim=(0, 2))
    s = torch.minimum(s_1, s_2)
    s = torch.where((W != 0).any(dim=2).any(dim=0), s, torch.ones_like(s)).clamp(1.0, max_factor)
    return shrink_until_kept(W, s, W_max, W_min)


def shrink_until_kept(W: Tensor, s: Tensor, W_max: Tensor, W_min: Tensor) -> Tensor:
    """`s`, moved down by single float32 steps where rounding took a product past an extreme."""
    for _ in range(4):
        product = W * s.view(1, -1, 1)
        beyond = ((product > W_max) | (product < W_min)).any(dim=2).any(dim=0)
        if not beyond.any():
            break
        s = torch.where(beyond, torch.nextafter(s, torch.zeros_like(s)).clamp(min=1.0), s)
    return s


@register_step
class WeightDilation(ScalingStep):
    """Dilate the in-channels of every layer; 1/s is folded where that is exact.

    `max_factor`: upper bound of the factors. `fold`: see `ScalingStep`.
    """

    name = "weight_dilation"
    max_factor: float = Field(100.0, ge=1.0)
    fold: bool = True

    def apply(self, session: Session) -> None:
        """Scale all layers; the summary has the unsaturated share and range change per layer."""
        session.require_no_ranges(self.name)
        session.summary[self.name] = apply_scaling(
            session,
            lambda W, _: dilation_factors(W, self.max_factor),
            fold=self.fold,
        )
