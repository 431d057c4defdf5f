"""Timestep-Channel joint Reparameterization (TCR): TCAQ-DM, arXiv 2412.16700 (AAAI 2025).

The in-channels of a layer input differ in range, and each differs from step to step. One factor for
each in-channel, its range over the smallest one averaged over the steps, evens them out; the weight
takes up the difference, whatever that does to its own range. Section on TCR, equations 3 to 5.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepquant.methods.equivalent_scaling import ScalingStep, apply_scaling
from stepquant.methods.session import Session
from stepquant.methods.step import register_step
from stepquant.quantizers import QuantConv2d, QuantLayer

DEFAULT_TRUNCATION = 10.0  # a choice: see `reparameterization_factors`


def reparameterization_factors(p: Tensor, truncation: float) -> Tensor:
    """Factors `r`, `[C]`, between 1 and `truncation`.

    `p [T, C]` is the largest magnitude of each in-channel at each step. With the target
    `s_t = min over d of p_t[d]` and the ratio `r_t[d] = p_t[d] / s_t` (equations 3 and 4), `r[d]`
    is the mean of `r_t[d]` over the steps, weighted by `p_t[d]` (equation 5).

    Implemented from published descriptions of the paper, without its code. These leave open what
    bounds the ratios, and which channels the minimum is over. Deviations:

    - Each `r_t[d]` is at most `truncation`, before the mean. Otherwise one channel that is almost
      dead makes all other factors huge. The value is not found in the paper, nor whether it bounds
      `r_t` or `r`.
    - A channel that is zero at a step counts neither for `s_t` nor, having no weight in the mean,
      for its own `r` there. One that is zero at every step gets 1.
    """
    exact = p.double()  # p * p / s may leave the range of float32
    live = exact > 0
    s = torch.where(live, exact, torch.inf).amin(dim=1, keepdim=True)  # [T, 1]
    r_t = (exact / s).clamp(1.0, truncation)
    total = exact.sum(dim=0)
    r = torch.where(total > 0, (exact * r_t).sum(dim=0) / total, 1.0)
    return r.to(p.dtype).clamp(1.0, truncation)


@register_step
class ChannelReparameterization(ScalingStep):
    """Even out the activation ranges of in-channels over all steps; weights are not looked at.

    `truncation`: upper bound of the ratios. `layers`: "conv" scales convolutions only, as the
    paper does; "all" scales linear layers too, which is a deviation. `fold`: see
    `ScalingStep`.
    """

    name = "channel_reparameterization"
    truncation: float = Field(DEFAULT_TRUNCATION, ge=1.0)
    layers: Literal["conv", "all"] = "conv"
    fold: bool = True

    def apply(self, session: Session) -> None:
        """Scale the chosen layers; the summary has the range change per layer."""
        session.require_no_ranges(self.name)
        records = apply_scaling(
            session,
            lambda _, p: reparameterization_factors(p, self.truncation),
            kind=QuantConv2d if self.layers == "conv" else QuantLayer,
            fold=self.fold,
        )
        if not records:
            session.reporter.line(
                f"step '{self.name}' changes nothing: the model has no convolutions; layers: all "
                "scales linear layers too"
            )
        session.summary[self.name] = records
