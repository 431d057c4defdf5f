"""Training on several steps of each trajectory at once, by the mean of their errors.

Ours, from no paper. An image is the result of many calls of the denoiser. Errors that point the
same way at all steps add up in it, while others mostly cancel out. So the mean of a block's errors
over steps of one trajectory says more about the image than the mean of their squares:

    L = || (1/K) sum over t of e_t ||^2

For errors with a part `c` that all steps share, and an independent part of variance `v` at each
step, the mean over `K` steps has the square `c^2 + v / K`; that of one step is `c^2 + v`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.calibration.trajectories import Trajectories
from stepquant.support.errors import StepQuantError


def check_together(step: str, together: int, batch: int) -> None:
    """Check that a batch holds the steps that are taken together.

    Args:
        step: Name of the step, for errors.
        together: Steps of one trajectory that are averaged.
        batch: Samples per optimizer step.

    Raises:
        StepQuantError: `together` exceeds `batch`.
    """
    if together > batch:
        raise StepQuantError(
            f"step '{step}' has steps_together {together} and batches of {batch}: expected "
            "steps_together of at most the batch; change one of them"
        )


def steps_of_each(data: Trajectories, samples: int, together: int) -> int:
    """Number `k` of steps of each trajectory that `coherent_inputs` takes.

    All `T` steps of the sampler, if all trajectories have the same conditions. Otherwise as few as
    give every trajectory a part in `samples`, but at least `together`: with whole trajectories
    there would be few of them, and most labels or prompts would be missing.
    """
    steps = len(data.timesteps)
    if not data.conditions.differ:
        return steps
    return min(steps, max(together, samples // (len(data) // steps)))


def coherent_inputs(
    data: Trajectories, samples: int, together: int, step: str, seed: int
) -> Trajectories:
    """About `samples` inputs of `data`, `k` steps of each trajectory, one trajectory after another.

    Input `i * k + j` is the `j`-th chosen step of trajectory `i`; `k` comes from `steps_of_each`.
    If `k` is less than `T`, one step is drawn at random from each of `k` equal parts of the
    sampler's steps. With guidance an image has two trajectories, which lie side by side, at the
    same steps. The result has at least two images.

    Raises:
        StepQuantError: There are fewer than two images; the message names `step`.
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
    """For each iteration, `together` random steps of each of `batch / together` trajectories.

    Indices `[batch]` into inputs from `coherent_inputs` with `steps` steps each, of which the first
    `trajectories` are used. The steps of one trajectory lie side by side.
    """
    batches = []
    for _ in range(iterations):
        owners = torch.randint(trajectories, (batch // together,), generator=generator)
        batches.append(_groups(owners, steps, together, 1, generator))
    return batches


def held_out_groups(
    trajectories: Tensor, steps: int, together: int, generator: torch.Generator
) -> Tensor:
    """Indices of `trajectories` in groups of `together` steps; no step is in two groups."""
    return _groups(trajectories, steps, together, steps // together, generator)


def _groups(
    trajectories: Tensor, steps: int, together: int, groups: int, generator: torch.Generator
) -> Tensor:
    """Indices of `groups` disjoint groups of `together` random steps of each trajectory."""
    chosen = [
        int(owner) * steps + torch.randperm(steps, generator=generator)[: together * groups]
        for owner in trajectories
    ]
    return torch.cat(chosen)


def of_all_kinds(index: Tensor, steps: int, kinds: int) -> Tensor:
    """Indices of all inputs of each image and step, side by side, `[N * kinds]`.

    Args:
        index: `i * steps + j` for the `j`-th step of image `i`, `[N]`.
        steps: Steps of each trajectory in `coherent_inputs`.
        kinds: Trajectories of one image; above 1 with guidance.
    """
    trajectory = index.div(steps, rounding_mode="floor")[:, None] * kinds + torch.arange(kinds)
    return (trajectory * steps + (index % steps)[:, None]).flatten()


def shared_error(error: Tensor, together: int) -> Tensor:
    """Mean of `error [B, ...]` over each `together` neighbours, `[B / together, ...]`."""
    return error.unflatten(0, (-1, together)).mean(dim=1)
