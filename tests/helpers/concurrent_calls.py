"""Calls that run at the same time, and meet in the middle so that they surely interleave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import nn

PATIENCE = 120  # seconds until a thread that waits in vain fails


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """What `calls` return, each in a thread of its own; they start together."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(PATIENCE)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


@contextmanager
def meeting(model: nn.Module, names: Sequence[str], parties: int = 2) -> Iterator[None]:
    """Let `parties` threads wait for each other where they reach the modules `names`."""
    handles = []
    for name in names:
        barrier = threading.Barrier(parties)
        hook = _waiting(barrier)
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _waiting(barrier: threading.Barrier) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        barrier.wait(PATIENCE)

    return hook
