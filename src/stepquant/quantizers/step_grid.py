"""Mapping of a scheduler's timestep to a row of the step tables.

The timestep is always an argument of the denoiser, and a forward pre-hook reads it. Nothing counts
calls. Samples of one batch may be at different steps, and so may calls of one denoiser in several
threads.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stepquant.quantizers.call_state import PerThread
from stepquant.support.errors import StepQuantError

_OWNERS = threading.Lock()  # guards the change of a context's owner; no attribute, to be copyable


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
    """Table rows of the forward pass that runs in this thread.

    A denoiser and its quantized layers share one context. Each thread has rows of its own, and so
    has each call inside another call. A deep copy takes over the rows of the thread that makes it.
    """

    def __init__(self, grid: StepGrid) -> None:
        self.grid = grid
        self._position = 0  # of `timestep` among the denoiser's positional arguments
        self._here = PerThread()
        # For threads that have no rows, such as those in which autograd runs a checkpointed block
        # again: the rows set last, and the only thread that set any.
        self._latest = torch.zeros(1, dtype=torch.int64)
        self._owner: int | None = None
        self._shared = False  # whether several threads set rows

    @property
    def rows(self) -> Tensor:
        """The rows of the innermost call in this thread, int64 `[1]` or `[B]`.

        Outside of a call they are those of the thread's last call, or the last that were set. In a
        thread without any they are those of the only thread that has some, or row 0.

        Raises:
            StepQuantError: this thread has no rows, and several others have.
        """
        rows = self._here.state.value
        return self._rows_of_owner() if rows is None else rows

    @rows.setter
    def rows(self, rows: Tensor) -> None:
        self._set(rows)

    def set_timestep(self, timestep: Tensor | float) -> None:
        """Choose this thread's rows for `timestep` (a scalar, or one per sample, `[B]`).

        If all samples agree, `rows` is `[1]`. The exception is a compiled graph that gets `[B]`
        separately stored timesteps: it cannot branch on their values, so `rows` stays `[B]`.
        """
        if isinstance(timestep, Tensor) and timestep.dim() == 1 and timestep.stride(0) == 0:
            timestep = timestep[:1]  # one stored number, expanded by the pipeline
        rows = self.grid.rows(timestep)
        if rows.numel() > 1 and not torch.compiler.is_compiling():
            rows = rows[:1] if bool((rows == rows[0]).all()) else rows
        self._set(rows)

    def ensure_rows(self) -> None:
        """Give this thread row 0 where `rows` would be an error.

        For asking layers how they would run, not for running them.
        """
        if self._shared and self._here.state.value is None:
            self._here.state.value = torch.zeros(1, dtype=torch.int64)

    def attach(self, denoiser: nn.Module) -> Attachment:
        """Register forward hooks that read the `timestep` of every call of `denoiser`.

        Returns what removes the hooks. The pre-hook raises StepQuantError for a call without a
        timestep.

        Raises:
            StepQuantError: `denoiser.forward` has no argument named `timestep`.
        """
        self._position = timestep_position(denoiser)
        # Bound methods: the hooks of a deep-copied denoiser then use the copied context.
        return Attachment(
            denoiser.register_forward_pre_hook(self._begin, with_kwargs=True),
            denoiser.register_forward_hook(self._end, always_call=True),
        )

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._here.state.begin()
        timestep = kwargs.get("timestep")
        if timestep is None and self._position < len(args):
            timestep = args[self._position]
        if timestep is None:
            raise StepQuantError(
                "the denoiser was called without a timestep: expected one for the batch or one "
                "for each sample; the scales of a quantized model depend on it"
            )
        self.set_timestep(timestep)

    def _end(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._here.state.end()

    def _set(self, rows: Tensor) -> None:
        self._here.state.value = rows
        if torch.compiler.is_compiling() or self._shared:
            return
        if self._owner != threading.get_ident():
            with _OWNERS:
                self._shared = self._owner is not None
                self._owner = threading.get_ident()
        self._latest = rows

    def _rows_of_owner(self) -> Tensor:
        if self._shared:
            raise StepQuantError(
                "a quantized layer was called in a thread that has no timestep, while several "
                "others use its denoiser: expected a call of the denoiser, or "
                "`context.set_timestep`, in the same thread"
            )
        return self._latest

    def __getstate__(self) -> dict[str, Any]:
        rows = self._here.state.value
        return {"grid": self.grid, "position": self._position, "rows": rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["grid"])  # type: ignore[misc]
        self._position = state["position"]
        if state["rows"] is not None:
            self._set(state["rows"])


class Attachment:
    """The hooks of a context on a denoiser."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Remove them."""
        for handle in self._handles:
            handle.remove()


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
