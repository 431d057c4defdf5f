"""Latency of several callables, timed in turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from stepquant.support.errors import StepQuantError


@dataclass(frozen=True)
class Timing:
    """Latency of one callable, in milliseconds.

    Attributes:
        median_ms: median of the timed runs, ms.
        p10: 10th percentile, ms.
        p90: 90th percentile, ms.
        runs: number of timed runs.
    """

    median_ms: float
    p10: float
    p90: float
    runs: int


def _wait_for_device() -> None:
    """Wait for queued CUDA work: kernel launches return before the kernels finish."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def measure_latency(
    callables: Mapping[str, Callable[[], object]],
    repeats: int = 20,
    warmup: int = 3,
    leads: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables in turns, in one process, and return their medians and percentiles.

    Every round runs each callable once, so a change in the machine's speed (other processes, heat,
    clock) affects all of them alike. The order rotates from round to round. Return
    values are discarded.

    Args:
        callables: the callables by name.
        repeats: timed rounds, one or more.
        warmup: untimed rounds before them, zero or more.
        leads: untimed calls of a callable right before each of its timed calls, zero or more. They
            warm the CPU caches, as the repeated calls of a sampler do.
        clock: a monotonic clock in seconds, read before and after each timed call.

    Returns:
        A `Timing` per name, in the order of `callables`.

    Raises:
        StepQuantError: `callables` is empty, or `repeats`, `warmup` or `leads` is too small.
            Exceptions of the callables propagate.
    """
    if not callables:
        raise StepQuantError("there are no callables to time: expected one or more, by name")
    if repeats < 1 or warmup < 0 or leads < 0:
        raise StepQuantError(
            f"repeats is {repeats}, warmup {warmup} and leads {leads}: expected repeats of one or "
            "more, warmup and leads of zero or more"
        )
    names = list(callables)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn < warmup:
                callables[name]()
                continue
            for _ in range(leads):
                callables[name]()
            _wait_for_device()
            start = clock()
            callables[name]()
            _wait_for_device()
            samples[name].append((clock() - start) * 1e3)
    return {name: _summary(values) for name, values in samples.items()}


def _summary(milliseconds: list[float]) -> Timing:
    values = torch.tensor(milliseconds, dtype=torch.float64)
    marks = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    median, p10, p90 = torch.quantile(values, marks).tolist()
    return Timing(median, p10, p90, len(milliseconds))


def ratios(timings: Mapping[str, Timing], baseline: str) -> dict[str, float]:
    """Speedup of each entry over `baseline`: the ratio of medians, 1.0 for the baseline itself.

    Raises:
        StepQuantError: `baseline` is not in `timings`, or a median is zero.
    """
    if baseline not in timings:
        raise StepQuantError(
            f"the baseline '{baseline}' was not timed: expected one of {', '.join(timings)}"
        )
    for name, timing in timings.items():
        if not timing.median_ms > 0:
            raise StepQuantError(
                f"'{name}' took {timing.median_ms} ms: expected more than the clock can resolve; "
                "do more work per call"
            )
    return {name: timings[baseline].median_ms / t.median_ms for name, t in timings.items()}
