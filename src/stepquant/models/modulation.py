"""Norms that a linear layer modulates: `norm(x) * (1 + scale) + shift` (adaLN, DiT, 2023).

Such a norm has no weights of its own that a scaling could go to, but `scale` and `shift` are
channels of one linear layer's output: dividing `1 + scale` and `shift` of a channel divides the
channel, at every step alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Modulation:
    """The layer `linear` gives, in equal chunks of channels, a `shift` and a `scale`.

    Both are numbers of chunks; `consumers` are all layers that read the norm so modulated.
    """

    linear: str
    shift: int
    scale: int
    consumers: tuple[str, ...]


def fold_into_modulation(linear: nn.Module, shift: int, scale: int, factors: Tensor) -> None:
    """Divide what the chunks `shift` and `scale` of `linear` modulate by `factors [C]`."""
    weight, bias = linear.weight.data, linear.bias.data
    rows = [slice(chunk * len(factors), (chunk + 1) * len(factors)) for chunk in (shift, scale)]
    for part in rows:
        weight[part].div_(factors.view(-1, 1))
    bias[rows[0]].div_(factors)
    bias[rows[1]].add_(1).div_(factors).sub_(1)


def norm_modulations(
    model: nn.Module, norm: str, first: tuple[str, ...], second: tuple[str, ...] = ()
) -> list[Modulation]:
    """Those of an adaptive norm of diffusers, by its class.

    `first` reads what the norm itself gives; `second` the block's next norm, which the same linear
    layer modulates, if it does.
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
