"""How a sampler with guidance mixes the predictions of an image, told from where it went.

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, equation 6) calls the denoiser
twice for an image and goes on with `e_u + g (e_c - e_u)`. Which of the two comes first, and what
`g` is called, differs from pipeline to pipeline, so that none of them is asked. With DDIM the next
sample is `a x + b e`, and both samples are among the calibration inputs: the weights of the two
predictions in `e` are those that lead from one to the other, by least squares over all steps.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.calibration.trajectories import Trajectories, predict

IMAGES = 4  # that the weights are measured on
TOLERANCE = 1e-3  # of the squared change by guidance, what the mix may leave unexplained


@torch.no_grad()
def mixing_weights(model: nn.Module, scheduler: Any, trajectories: Trajectories) -> Tensor | None:
    """The weights of an image's predictions in what the sampler follows, `[kinds]`, of sum 1.

    In the order in which an image's inputs lie in `trajectories`. One weight of 1 without guidance.

    None where no weights that hold for all steps lead from each sample to the next: another
    sampler than DDIM, noise that it adds, clipped or rescaled predictions, a scale that changes or
    ends, samples that are not the same for all predictions of an image.
    """
    if not trajectories.guided:
        return torch.ones(1)
    if not isinstance(scheduler, DDIMScheduler):
        return None
    inputs = [trajectories.step(row, IMAGES) for row in range(len(trajectories.timesteps))]
    if len({len(step) for step in inputs}) > 1:
        return None
    kinds = len(inputs[0]) // len(inputs[0].trajectory.unique())
    towards, gone = [], []  # what each prediction changes beside the last one, what was changed
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
    if not left <= TOLERANCE * gap.square().sum():  # NaN, too
        return None
    return torch.cat([weights, 1 - weights.sum(dim=0, keepdim=True)]).float()


def mixed(predictions: Tensor, weights: Tensor) -> Tensor:
    """What the sampler makes of `predictions [images * kinds, ...]`, an image's side by side.

    `[images, ...]`, with `weights [kinds]` from `mixing_weights`.
    """
    if len(weights) == 1:
        return predictions
    by_kind = predictions.unflatten(0, (-1, len(weights)))
    return torch.einsum("k,nk...->n...", weights, by_kind)
