"""Weight Dilation (WD) of DilateQuant (arXiv 2409.14307), section 4.1, equations 5 and 10 to 12.

Equivalent scaling leaves the layer's output unchanged, with one factor for each in-channel `k`:

    Y = X W = (X / s) (s W)

WD chooses the largest `s_k >= 1` that preserve the weight range of every out-channel `o`:

    s_k1 = min over o, taps with W[o, k] > 0 of W_max[o] / W[o, k]
    s_k2 = min over o, taps with W[o, k] < 0 of W_min[o] / W[o, k]
    s_k  = min(s_k1, s_k2)

An in-channel that holds an extreme of some out-channel is saturated and gets `s_k = 1`. All others
are dilated: their activations shrink by `s_k`, and the weight error does not grow, because every
out-channel keeps its exact minimum and maximum.

Deviations:

- Each ratio is taken only where the weight has the sign in question. As printed, a zero weight
  divides by zero and a positive one gives minus infinity.
- The bounds contain zero, as the affine grid does: `W_max >= 0 >= W_min`.
- An in-channel of zeros gets 1, and `s` is at most `max_factor`.
- Where float32 rounding pushes `s W` past an extreme, `s_k` is lowered by single float32 steps.
- Each part of a concatenated input has its own bounds, as it has its own weight quantizer. Layers
  that share a folded producer share `s`.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from stepquant.methods.equivalent_scaling import ScalingStep, apply_scaling
from stepquant.methods.session import Session
from stepquant.methods.step import register_step


def dilation_factors(W: Tensor, max_factor: float) -> Tensor:
    """Largest factors `s >= 1` that preserve each out-channel's minimum and maximum.

    Equations 10 to 12, with the deviations that the module docstring lists.

    Args:
        W: Weight, `[C_out, C_in, ...]`; a conv has its kernel taps in the last dimensions.
        max_factor: Upper bound of the factors, at least 1.

    Returns:
        `s`, `[C_in]`, in the dtype of `W`.
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
    """Lower `s [C_in]` where rounding took a product `s W` past an extreme of its out-channel.

    Each of at most four passes moves the affected factors down by one float32 step, but not below
    1.

    Args:
        W: Weight, `[C_out, C_in, taps]`.
        s: Factors, `[C_in]`.
        W_max: Maximum of each out-channel, at least 0, `[C_out, 1, 1]`.
        W_min: Minimum of each out-channel, at most 0, `[C_out, 1, 1]`.
    """
    for _ in range(4):
        product = W * s.view(1, -1, 1)
        beyond = ((product > W_max) | (product < W_min)).any(dim=2).any(dim=0)
        if not beyond.any():
            break
        s = torch.where(beyond, torch.nextafter(s, torch.zeros_like(s)).clamp(min=1.0), s)
    return s


@register_step
class WeightDilation(ScalingStep):
    """Dilate the in-channels of every quantized layer, and fold `1 / s` where that is exact.

    Attributes:
        max_factor: Upper bound of the factors.
        fold: See `ScalingStep`.
    """

    name = "weight_dilation"
    max_factor: float = Field(100.0, ge=1.0)
    fold: bool = True

    def apply(self, session: Session) -> None:
        """Scale all layers; the summary has the dilated share and the range change of each part.

        Raises:
            StepQuantError: An earlier step has initialised the ranges.
        """
        session.require_no_ranges(self.name)
        session.summary[self.name] = apply_scaling(
            session,
            lambda W, _: dilation_factors(W, self.max_factor),
            fold=self.fold,
        )
