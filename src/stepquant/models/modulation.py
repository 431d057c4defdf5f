"""Norms that a linear layer modulates: `norm(x) * (1 + scale) + shift` (adaLN, DiT, 2023).

Such a norm has no weight that could absorb a scaling. But `scale` and `shift` are output channels
of one linear layer. Dividing `1 + scale` and `shift` of a channel divides that channel of the norm,
at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Modulation:
    """A linear layer whose output holds a `shift` and a `scale`, in equal chunks of channels.

    `shift` and `scale` are chunk indices. `consumers` names all layers that read the modulated
    norm.
    """

    linear: str
    shift: int
    scale: int
    consumers: tuple[str, ...]


def fold_into_modulation(linear: Any, shift: int, scale: int, factors: Tensor) -> None:
    """Divide the channels of a modulated norm by `factors [C]`, through its layer `linear`.

    `shift` and `scale` are chunk indices. The function changes weight and bias of `linear` in
    place.
    """
    weight, bias = linear.weight.data, linear.bias.data
    rows = [slice(chunk * len(factors), (chunk + 1) * len(factors)) for chunk in (shift, scale)]
    for part in rows:
        weight[part].div_(factors.view(-1, 1))
    bias[rows[0]].div_(factors)
    bias[rows[1]].add_(1).div_(factors).sub_(1)


def norm_modulations(
    model: nn.Module, norm: str, first: tuple[str, ...], second: tuple[str, ...] = ()
) -> list[Modulation]:
    """Return the modulations of one of diffusers' adaptive norms, chosen by its class.

    - `norm`: name of the norm in `model`.
    - `first`: layers that read the output of `norm`.
    - `second`: layers that read the block's next norm, if the same linear layer modulates it.

    The list is empty if the class is unknown or the norm's linear layer has no bias.
    """
    module = model.get_submodule(norm)
    linear = f"{norm}.linear"
    if getattr(getattr(module, "linear", None), "bias", None) is None:
        return []
    if isinstance(module, AdaLayerNormContinuous):
        return [Modulation(linear, 1, 0, first)]
    if isinstance(module, AdaLayerNormZeroSingle):
        return [Modulation(linear, 0, 1, first)]
    if isinstance(module, AdaLayerNormZero | SD35AdaLayerNormZeroX):
        return [Modulation(linear, 0, 1, first), Modulation(linear, 3, 4, second)]
    return []
