"""How far an error of the prediction at one sampling step moves the image in the end.

An early step decides what the image shows; an error of the same size near the end is hardly seen.
How much they differ depends on sampler, steps and model, so that it is measured: noise is added to
the prediction at one step, and the sampler goes on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.trajectories import Draw, Trajectories
from stepquant.errors import StepQuantError
from stepquant.progress import Reporter
from stepquant.quantizers import StepContext, StepGrid

PROBED = 12  # steps that are measured, the others lie between them
RELATIVE_NOISE = 0.05  # its root mean square, over the prediction's


@torch.no_grad()
def step_influence(
    model: nn.Module, draw: Draw, grid: StepGrid, images: int, seed: int, reporter: Reporter
) -> Tensor:
    """Mean squared change of the image by a relative squared error of 1 at each step, `[T]`.

    `draw` samples with `model`. Over `images` images, measured at `PROBED` steps and interpolated
    between them as a straight line of logarithms. The image is taken to be what the last step
    starts from, so that the last step itself cannot be measured: it gets the least of the others.
    """
    steps = len(grid)
    if steps < 3:
        return torch.ones(steps)
    rows = torch.linspace(0, steps - 2, min(PROBED, steps - 1)).round().long()
    clean = draw(images, seed).at_step(steps - 1)
    found = []
    with reporter.task("measuring what steps do", total=len(rows)) as task:
        for row in rows.tolist():
            moved = _disturbed(model, draw, grid, row, images, seed).at_step(steps - 1) - clean
            found.append(float(moved.square().mean()) / RELATIVE_NOISE**2)
            task.advance(note=f"step {row}")
    if not all(0 < value < torch.inf for value in found):
        raise StepQuantError(
            f"a disturbed prediction changes images by {found}, step by step: expected positive "
            "finite numbers; check the scheduler and the float model"
        )
    return _between(rows, torch.tensor(found), steps)


def _between(rows: Tensor, values: Tensor, steps: int) -> Tensor:
    """`[steps]` values from those at `rows`, lines of logarithms between; the last is the least."""
    at = torch.arange(steps - 1)
    right = torch.searchsorted(rows, at).clamp(1, len(rows) - 1)
    left = right - 1
    share = (at - rows[left]) / (rows[right] - rows[left])
    logs = values.log()
    line = (logs[left] + share * (logs[right] - logs[left])).exp()
    return torch.cat([line, line.min().view(1)])


def _disturbed(
    model: nn.Module, draw: Draw, grid: StepGrid, row: int, images: int, seed: int
) -> Trajectories:
    """Trajectories from `seed` on with noise in the predictions at step `row`."""
    context = StepContext(grid)
    generator = torch.Generator().manual_seed(seed + row)

    def disturb(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if int(context.rows[0]) == row:
            prediction: Tensor = output[0]  # of a tuple or of diffusers' output classes
            size = RELATIVE_NOISE * prediction.square().mean().sqrt()
            prediction += size * torch.randn(prediction.shape, generator=generator)

    handles = [context.attach(model), model.register_forward_hook(disturb)]
    try:
        return draw(images, seed)
    finally:
        for handle in handles:
            handle.remove()
