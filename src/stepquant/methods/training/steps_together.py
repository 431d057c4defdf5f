"""Errors that add up: training on several steps of each trajectory, by the mean of their errors.

An image is what many calls of the denoiser make together. Errors of its steps that point the same
way add up in it, and errors that do not mostly cancel out, so that the mean of a block's errors
over steps of one trajectory says more of the image than the mean of their squares. For errors with
a part `c` that all steps share and a part of variance `v` that is independent from step to step,
the mean over `K` steps has the square `c^2 + v / K`, where one step has `c^2 + v`.

This is our own; nothing in the papers that stepquant implements does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.calibration.trajectories import Trajectories
from stepquant.support.errors import StepQuantError


def check_together(step: str, together: int, batch: int) -> None:
    """An error, which names `step`, where `together` steps are more than a `batch` has."""
    if together > batch:
        raise StepQuantError(
            f"step '{step}' has steps_together {together} and batches of {batch}: expected no more "
            "than the batch; change one of them"
        )


def steps_of_each(data: Trajectories, samples: int, together: int) -> int:
    """How many steps `k` of each trajectory `coherent_inputs` takes.

    All `T` of the sampler. Where conditions differ, as few as give every trajectory a part in
    `samples`, but no fewer than are taken `together`: whole trajectories would be few, and most
    labels or prompts in none of them.
    """
    steps = len(data.timesteps)
    if not data.conditions.differ:
        return steps
    return min(steps, max(together, samples // (len(data) // steps)))


def coherent_inputs(
    data: Trajectories, samples: int, together: int, step: str, seed: int
) -> Trajectories:
    """About `samples` inputs of `data`, `k` steps of each trajectory, one after another.

    Input `i * k + j` is that at the `j`-th step taken of trajectory `i`, `k` from `steps_of_each`.
    Fewer than all steps are drawn at random, one from each of `k` equal parts of the sampler's.
    With guidance an image has two trajectories; they lie side by side, at the same steps. Those of
    two images are the least. Raises StepQuantError, which names `step`, where there is only one.
    """
    steps = len(data.timesteps)
    rows = []
    for row in range(steps):
        found = data.rows(row)
        rows.append(found[torch.argsort(data.trajectory[found], stable=True)])
    table = torch.stack(rows, dim=1)  # [trajectories, T]
    images = len(data.trajectory.unique())
    if images < 2:
        raise StepQuantError(
            f"step '{step}' has {images} calibration trajectory: expected at least 2, one to "
            "train on and one held out; raise calibration.trajectories"
        )
    k, kinds = steps_of_each(data, samples, together), len(table) // images
    ends = torch.arange(k + 1) * steps // k
    generator = torch.Generator().manual_seed(seed)
    within = torch.rand(images, k, generator=generator) * ends.diff()
    chosen = (ends[:-1] + within.long()).repeat_interleave(kinds, dim=0)  # [trajectories, k]
    count = max(2, samples // (k * kinds)) * kinds
    return data.take(table.gather(1, chosen)[:count].flatten())


def coherent_batches(
    trajectories: int,
    steps: int,
    together: int,
    batch: int,
    iterations: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """For each iteration `together` random steps of each of `batch / together` trajectories.

    Indices `[batch]` into `coherent_inputs` of `steps` each, of its first `trajectories`; the steps
    of one trajectory lie side by side.
    """
    batches = []
    for _ in range(iterations):
        owners = torch.randint(trajectories, (batch // together,), generator=generator)
        batches.append(_groups(owners, steps, together, 1, generator))
    return batches


def held_out_groups(
    trajectories: Tensor, steps: int, together: int, generator: torch.Generator
) -> Tensor:
    """Indices of `trajectories` in groups of `together` steps, each step in one group at most."""
    return _groups(trajectories, steps, together, steps // together, generator)


def _groups(
    trajectories: Tensor, steps: int, together: int, groups: int, generator: torch.Generator
) -> Tensor:
    chosen = [
        int(owner) * steps + torch.randperm(steps, generator=generator)[: together * groups]
        for owner in trajectories
    ]
    return torch.cat(chosen)


def of_all_kinds(index: Tensor, steps: int, kinds: int) -> Tensor:
    """Indices of all inputs of each image and step, side by side, `[N * kinds]`.

    `index [N]`: `i * steps + j` for the `j`-th step of image `i`. With guidance an image has
    `kinds` trajectories in `coherent_inputs` of `steps` each.
    """
    trajectory = index.div(steps, rounding_mode="floor")[:, None] * kinds + torch.arange(kinds)
    return (trajectory * steps + (index % steps)[:, None]).flatten()


def shared_error(error: Tensor, together: int) -> Tensor:
    """The mean of `error [B, ...]` over each `together` neighbours, `[B / together, ...]`."""
    return error.unflatten(0, (-1, together)).mean(dim=1)
