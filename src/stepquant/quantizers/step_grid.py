"""Mapping of a scheduler's timestep to a row of the step tables.

The timestep is always an argument of the denoiser, and one forward pre-hook reads it. Nothing
counts calls, and nothing is global. Samples of one batch may be at different steps.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.support.errors import StepQuantError


class StepGrid:
    """The recorded timesteps, one for each row of the step tables."""

    def __init__(self, timesteps: Tensor) -> None:
        """Store `timesteps [T]`, finite and distinct, in any order, as float32 on the CPU.

        Raises:
            StepQuantError: `timesteps` has another shape, is empty, or holds a repeated or
                non-finite value.
        """
        timesteps = torch.as_tensor(timesteps).detach().to(torch.float32).cpu()
        if timesteps.dim() != 1 or timesteps.numel() == 0:
            raise StepQuantError(
                f"step grid has shape {tuple(timesteps.shape)}: expected one dimension with at "
                "least one timestep"
            )
        if not torch.isfinite(timesteps).all() or timesteps.unique().numel() != timesteps.numel():
            raise StepQuantError(
                "step grid holds a timestep twice or one that is not finite: expected distinct "
                "finite timesteps"
            )
        self.timesteps = timesteps  # [T]

    def __len__(self) -> int:
        return self.timesteps.numel()

    def rows(self, timestep: Tensor | float) -> Tensor:
        """Return the row of the nearest recorded timestep, int64.

        The result is `[1]` for a scalar and `[B]` for timesteps `[B]`. On a tie, the row that comes
        first in the grid wins.
        """
        at = torch.as_tensor(timestep)
        grid = self.timesteps.to(at.device)
        return (at.reshape(-1, 1).to(torch.float32) - grid).abs().argmin(dim=1)


class StepContext:
    """Table rows of the current forward pass, shared by a denoiser and its quantized layers."""

    def __init__(self, grid: StepGrid) -> None:
        self.grid = grid
        self.rows = torch.zeros(1, dtype=torch.int64)  # [1] or [B]
        self._position = 0  # of `timestep` among the denoiser's positional arguments

    def set_timestep(self, timestep: Tensor | float) -> None:
        """Choose the rows for `timestep` (a scalar, or one per sample, `[B]`).

        If all samples agree, `rows` is `[1]`. The exception is a compiled graph that gets `[B]`
        separately stored timesteps: it cannot branch on their values, so `rows` stays `[B]`.
        """
        if isinstance(timestep, Tensor) and timestep.dim() == 1 and timestep.stride(0) == 0:
            timestep = timestep[:1]  # one stored number, expanded by the pipeline
        rows = self.grid.rows(timestep)
        if rows.numel() > 1 and not torch.compiler.is_compiling():
            rows = rows[:1] if bool((rows == rows[0]).all()) else rows
        self.rows = rows

    def attach(self, denoiser: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Register a forward pre-hook that reads the `timestep` of every call of `denoiser`.

        Returns the handle that removes the hook. The hook raises StepQuantError for a call without
        a timestep.

        Raises:
            StepQuantError: `denoiser.forward` has no argument named `timestep`.
        """
        self._position = timestep_position(denoiser)
        # A bound method: the hook of a deep-copied denoiser then writes to the copied context.
        return denoiser.register_forward_pre_hook(self._read_timestep, with_kwargs=True)

    def _read_timestep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs.get("timestep")
        if timestep is None and self._position < len(args):
            timestep = args[self._position]
        if timestep is None:
            raise StepQuantError(
                "the denoiser was called without a timestep: expected one for the batch or one "
                "for each sample; the scales of a quantized model depend on it"
            )
        self.set_timestep(timestep)


def timestep_position(denoiser: nn.Module) -> int:
    """Return the position of `timestep` among the arguments of `denoiser.forward`.

    Raises:
        StepQuantError: there is no argument of that name.
    """
    names = list(inspect.signature(denoiser.forward).parameters)
    if "timestep" not in names:
        raise StepQuantError(
            f"{type(denoiser).__name__}.forward has the arguments ({', '.join(names)}): expected "
            "one called 'timestep'; wrap the model so that it takes the timestep by that name"
        )
    return names.index("timestep")
