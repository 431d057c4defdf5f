"""State of the calls that run now, kept apart for each thread and for each nested call.

Several threads may call one model at once, and a hook of a model may call the model. What belongs
to a call therefore lies neither on the model nor on its layers, but in a `CallState` of the thread.
A call of a module begins and ends in one thread, without an `await` between, so tasks of asyncio
that share a thread cannot get into each other's calls.

This is a `threading.local` and no context variable because `torch.compile` traces it: dynamo reads
the thread's object and reads and writes attributes of that, whereas it knows no context variables,
and does not write attributes of the `threading.local` itself.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import nn

_CALL = nn.Module._call_impl.__code__


class CallState:
    """One value for the innermost call that runs in this thread.

    `begin` and `end` are called by a forward pre-hook and by a forward hook with `always_call`.
    After the outermost call, the value is left as it is: code that runs parts of a model on their
    own reads it, and so does gradient checkpointing, which runs blocks again after the call.
    """

    __slots__ = ("_calls", "value")

    def __init__(self) -> None:
        self.value: Any = None
        # The running calls, the innermost first: the frame that runs the call, the value that was
        # there before it, and the calls around it.
        self._calls: tuple[FrameType | None, Any, Any] | None = None

    def begin(self) -> None:
        """Note that a call begins; the value stays until it is set."""
        frame = None
        if not torch.compiler.is_compiling():  # a graph has no frames
            frame = _frame_of_call()
            # KeyboardInterrupt is no Exception, so it ends a call without its hook.
            while self._calls is not None and not _runs(self._calls[0]):
                self._calls = self._calls[2]
        # The outermost call gives nothing back. A graph that read the value would depend on the
        # shape that an earlier call left.
        before = None if self._calls is None else self.value
        self._calls = (frame, before, self._calls)

    def end(self) -> Any:
        """Return the value of the call that ends here, and set that of the call around it.

        The result is None for a call whose `begin` did not run because an earlier hook failed.
        """
        calls = self._calls
        if calls is None:
            return None
        frame, before, around = calls
        if (
            frame is not None
            and not torch.compiler.is_compiling()
            and frame is not _frame_of_call()
        ):
            return None
        self._calls, value = around, self.value
        if around is not None:
            self.value = before
        return value


class PerThread(threading.local):
    """Holds the `CallState` of each thread as `state`; a copy starts with empty ones."""

    def __init__(self) -> None:
        self.state = CallState()

    def __reduce__(self) -> tuple[type[PerThread], tuple[()]]:
        return PerThread, ()


def _frame_of_call() -> FrameType | None:
    """The frame of the innermost call of a module: torch runs hooks inside of it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _CALL:
        frame = frame.f_back
    return frame


def _runs(frame: FrameType | None) -> bool:
    """Whether `frame` is on the stack of this thread; a call in a graph has none and counts."""
    if frame is None:
        return True
    at: FrameType | None = sys._getframe()
    while at is not None and at is not frame:
        at = at.f_back
    return at is not None
