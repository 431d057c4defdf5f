"""A block in training, guarded by its loss on held-out samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepquant.calibration.block_inputs import BlockData, joined_output
from stepquant.methods.session import Session
from stepquant.methods.training.steps_together import (
    coherent_batches,
    held_out_groups,
    shared_error,
)
from stepquant.support.errors import StepQuantError

CHECKS = 8  # measurements of the held-out loss, evenly over the training


class GuardedBlock:
    """A block in training, its loss, and its state with the lowest loss on held-out samples.

    The loss is the mean squared error over the mean square of the target. With `together` above 1,
    it is the mean square of the error's mean over that many neighbours in a batch, which are steps
    of one trajectory (all `steps` that the data have of it, if these are fewer).

    The last eighth of the samples, or of the trajectories, is held out.

    Attributes:
        block: The module that is trained.
        train: Indices of the samples that are not held out, int64.
        first: Held-out loss before training.
        best: Lowest held-out loss so far.
    """

    def __init__(
        self,
        session: Session,
        step: str,
        name: str,
        block: nn.Module,
        data: BlockData,
        batch: int,
        together: int = 1,
        steps: int = 1,
    ) -> None:
        """Measure the held-out loss, `2 * batch` samples at once.

        `step` and `name` are those of the step and the block, for errors.
        """
        self.block = block
        self._step, self._name, self._data = step, name, data
        self._steps = 1 if together == 1 else steps
        self._context, self._together = session.context, min(together, self._steps)
        self._chunk = max(1, 2 * batch // self._together) * self._together
        units = len(data) // self._steps  # samples, or trajectories
        kept = units - max(1, units // 8)
        self.train = torch.arange(kept * self._steps)
        self._held_out = torch.arange(kept * self._steps, len(data))
        if together > 1:
            generator = torch.Generator().manual_seed(session.seed)
            held_out = torch.arange(kept, units)
            self._held_out = held_out_groups(held_out, self._steps, self._together, generator)
        self._power = self._mean_square().clamp(min=1e-12)
        self.first = self.best = self._evaluate()
        self._state: dict[str, Tensor] = {}
        self._keep()

    def loss(self, index: Tensor) -> Tensor:
        """The loss on the samples `index`, a differentiable scalar.

        Raises:
            StepQuantError: The loss is not finite; the message names the block.
        """
        args, kwargs, target, timestep = self._data.batch(index)
        self._context.set_timestep(timestep)
        output = joined_output(self.block(*args, **kwargs))
        error = output - target
        if self._together > 1:
            error = shared_error(error, self._together)
        loss = error.square().mean() / self._power
        if not torch.isfinite(loss):
            raise StepQuantError(
                f"the loss of block '{self._name}' is {loss.item()} in step '{self._step}': "
                "expected a finite number; lower the learning rates or check the float model"
            )
        return loss

    def _mean_square(self) -> Tensor:
        """Mean square of the target, chunk by chunk: the target may not fit in memory."""
        total = torch.zeros((), dtype=torch.float64)
        for chunk in self._data.target.split(self._chunk):
            total += chunk.square().sum(dtype=torch.float64)
            self._data.spill.release()
        return (total / self._data.target.numel()).to(torch.float32)

    def batches(self, batch: int, iterations: int, generator: torch.Generator) -> list[Tensor]:
        """`batch` training indices for each iteration, drawn over all sampling steps."""
        if self._steps == 1:
            return mixed_batches(self.train, batch, iterations, generator)
        trajectories = len(self.train) // self._steps
        return coherent_batches(
            trajectories, self._steps, self._together, batch, iterations, generator
        )

    def check(self) -> None:
        """Measure the held-out loss, and keep the state if the loss is the lowest."""
        now = self._evaluate()
        if now < self.best:
            self.best = now
            self._keep()

    def restore(self) -> None:
        """Load the best state so far."""
        self.block.load_state_dict(self._state)

    def finish(self) -> tuple[float, float]:
        """Load the best state and drop gradients; returns held-out losses `(before, after)`."""
        self.restore()
        for parameter in self.block.parameters():
            parameter.grad = None
        return self.first, self.best

    @torch.no_grad()
    def _evaluate(self) -> float:
        chunks = self._held_out.split(self._chunk)
        total = sum(self.loss(chunk).item() * len(chunk) for chunk in chunks)
        return total / len(self._held_out)

    def _keep(self) -> None:
        self._state = {key: value.clone() for key, value in self.block.state_dict().items()}


def is_check(iteration: int, iterations: int) -> bool:
    """Whether the held-out loss is measured after `iteration`, counted from 0."""
    every = max(1, iterations // CHECKS)
    return (iteration + 1) % every == 0 or iteration + 1 == iterations


def mixed_batches(
    train: Tensor, batch: int, iterations: int, generator: torch.Generator
) -> list[Tensor]:
    """`batch` random indices from `train` for each iteration, drawn over all sampling steps."""
    return [
        train[torch.randint(len(train), (batch,), generator=generator)] for _ in range(iterations)
    ]
