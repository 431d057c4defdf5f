"""Timestep-Channel joint Reparameterization (TCR) of TCAQ-DM (arXiv 2412.16700, AAAI 2025).

Section on TCR, equations 3 to 5. `p_t[d]` is the largest magnitude of in-channel `d` at step `t`:

    s_t    = min over d of p_t[d]                                    (target range)
    r_t[d] = p_t[d] / s_t
    r[d]   = sum over t of p_t[d] r_t[d] / sum over t of p_t[d]
    X' = X / r,    W' = r W

One `r` serves all steps. It evens out the activation ranges; the weight ranges take up the
difference, without a bound.

Implemented from published descriptions of the paper, without its code. Deviations:

- Each `r_t[d]` is at most `truncation`, before the mean. Otherwise one nearly dead channel makes
  all other factors huge. We did not find the paper's value, nor whether it bounds `r_t` or `r`.
- A channel that is zero at a step counts neither for `s_t` nor for its own mean at that step. A
  channel that is zero at every step gets 1.
- The descriptions leave open which channels the minimum is over. Here each part of a concatenated
  input has its own `s_t`, as it has its own quantizer.
- `layers: all` scales linear layers too; the paper scales convs only.
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

DEFAULT_TRUNCATION = 10.0  # our choice, see the module docstring


def reparameterization_factors(p: Tensor, truncation: float) -> Tensor:
    """Factors `r`, `[C]`, between 1 and `truncation` (equations 3 to 5).

    The module docstring has the equations and the deviations. Computed in float64, because
    `p_t[d] r_t[d]` may leave the range of float32.

    Args:
        p: Largest magnitude of each in-channel at each step, `[T, C]`, at least 0.
        truncation: Upper bound of the ratios `r_t[d]`, at least 1.

    Returns:
        `r`, in the dtype of `p`.
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
    """Even out the activation ranges of in-channels over all steps, whatever the weights are.

    Attributes:
        truncation: Upper bound of the ratios `r_t[d]`.
        layers: "conv" scales convs only, as the paper does; "all" scales linear layers too, which
            is a deviation.
        fold: See `ScalingStep`.
    """

    name = "channel_reparameterization"
    truncation: float = Field(DEFAULT_TRUNCATION, ge=1.0)
    layers: Literal["conv", "all"] = "conv"
    fold: bool = True

    def apply(self, session: Session) -> None:
        """Scale the chosen layers; the summary has the range change of each input part.

        A model without a layer of the chosen kind stays as it is, and the reporter says so.

        Raises:
            StepQuantError: An earlier step has initialised the ranges.
        """
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
