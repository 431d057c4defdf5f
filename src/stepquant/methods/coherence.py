"""Errors that add up: block training on whole trajectories, by the mean error of several steps.

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
from stepquant.errors import StepQuantError


def check_together(step: str, together: int, batch: int) -> None:
    """An error, which names `step`, where `together` steps are more than a `batch` has."""
    if together > batch:
        raise StepQuantError(
            f"step '{step}' has steps_together {together} and batches of {batch}: expected no more "
            "than the batch; change one of them"
        )


def whole_trajectories(data: Trajectories, samples: int, step: str) -> Trajectories:
    """About `samples` inputs of `data`, all steps of each image, one image after another.

    Input `i * T + t` is that at step `t`, of `T`, on trajectory `i`; with guidance an image has two
    trajectories. Two are the least. Raises StepQuantError, which names `step`, where there is only
    one.
    """
    steps = len(data.timesteps)
    rows = []
    for row in range(steps):
        found = data.rows(row)
        rows.append(found[torch.argsort(data.trajectory[found], stable=True)])
    table = torch.stack(rows, dim=1)  # [trajectories, T]
    if len(table) < 2:
        raise StepQuantError(
            f"step '{step}' has {len(table)} calibration trajectory: expected at least 2, one to "
            "train on and one held out; raise calibration.trajectories"
        )
    return data.take(table[: max(2, samples // steps)].flatten())


def coherent_batches(
    trajectories: int,
    steps: int,
    together: int,
    batch: int,
    iterations: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """For each iteration `together` random steps of each of `batch / together` trajectories.

    Indices `[batch]` into `whole_trajectories`, of its first `trajectories`; the steps of one
    trajectory lie side by side.
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


def shared_error(error: Tensor, together: int) -> Tensor:
    """The mean of `error [B, ...]` over each `together` neighbours, `[B / together, ...]`."""
    return error.unflatten(0, (-1, together)).mean(dim=1)
