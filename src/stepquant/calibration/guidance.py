"""Weights with which a guided sampler mixes an image's predictions, measured from its trajectory.

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6) calls the denoiser
twice for an image and continues with `e = e_u + g (e_c - e_u)`. The order of the two predictions
and the name of `g` differ between pipelines, so this module does not read them from the pipeline.
With DDIM, the next sample is `a x + b e`. The calibration inputs hold both samples, `x` and the
next one. The weights of the two predictions in `e` then follow by least squares over all steps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories, predict

IMAGES = 4  # images that the weights are measured on
TOLERANCE = 1e-3  # largest share of guidance's squared change that the mix may leave unexplained


@torch.no_grad()
def mixing_weights(model: nn.Module, scheduler: Any, trajectories: Trajectories) -> Tensor | None:
    """Return the weights of an image's predictions in the sampler's mix, `[kinds]`, with sum 1.

    The order is that of an image's inputs in `trajectories`. Without guidance there is one weight,
    1. `model` predicts for the first `IMAGES` images.

    The function returns None if no constant weights lead from each sample to the next. Reasons are

    - a sampler other than DDIM, or one that adds noise,
    - clipped or rescaled predictions,
    - a guidance scale that changes or stops during sampling,
    - samples that differ between the predictions of an image.
    """
    if not trajectories.guided:
        return torch.ones(1)
    if not isinstance(scheduler, DDIMScheduler):
        return None
    inputs = [trajectories.step(row, IMAGES) for row in range(len(trajectories.timesteps))]
    if len({len(step) for step in inputs}) > 1:
        return None
    kinds = len(inputs[0]) // len(inputs[0].trajectory.unique())
    # Next samples minus that of the last prediction alone: those of the others, and the actual one.
    towards, gone = [], []
    for now, after in pairwise(inputs):
        x, *others = (now.sample[kind::kinds] for kind in range(kinds))
        if not all(torch.equal(x, other) for other in others):
            return None
        prediction = predict(model, now)[:, : x.shape[1]]
        ends = [
            scheduler.step(prediction[kind::kinds], now.timestep[0].long(), x).prev_sample.double()
            for kind in range(kinds)
        ]
        towards.append(torch.stack([(end - ends[-1]).flatten() for end in ends[:-1]], dim=1))
        gone.append((after.sample[::kinds].double() - ends[-1]).flatten())
    if not gone:
        return None
    changes, gap = torch.cat(towards), torch.cat(gone)
    weights = torch.linalg.lstsq(changes, gap[:, None]).solution[:, 0]
    left = (gap - changes @ weights).square().sum()
    if not left <= TOLERANCE * gap.square().sum():  # also true for NaN
        return None
    return torch.cat([weights, 1 - weights.sum(dim=0, keepdim=True)]).float()


def mixed(predictions: Tensor, weights: Tensor) -> Tensor:
    """Mix `predictions [images * kinds, ...]` as the sampler does, and return `[images, ...]`.

    The predictions of one image are adjacent. `weights [kinds]` are those of `mixing_weights`.
    """
    if len(weights) == 1:
        return predictions
    by_kind = predictions.unflatten(0, (-1, len(weights)))
    return torch.einsum("k,nk...->n...", weights, by_kind)
