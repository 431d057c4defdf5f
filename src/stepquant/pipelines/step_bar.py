"""Progress within one call of a pipeline: diffusers' bar over sampling steps, as calls of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline


class StepBar:
    """Stands in for the bar of `DiffusionPipeline.progress_bar`: shows nothing, calls `report`.

    `report` gets the share of the steps that are done, above 0 and at most 1. If the number of
    steps is unknown, it is never called.
    """

    def __init__(
        self,
        report: Callable[[float], None],
        iterable: Iterable[Any] = (),
        total: int | None = None,
        **_: Any,
    ) -> None:
        """`iterable` or `total` as in `progress_bar`; settings of the bar's look are ignored."""
        self._report, self._iterable = report, iterable
        self._total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self._steps = 0.0

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            yield item
            self.update()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Count `n` more steps."""
        self._steps += n
        if self._total:
            self._report(min(1.0, self._steps / self._total))

    def close(self) -> None:
        """Do nothing, as there is no bar."""

    def set_description(self, *_: object, **__: object) -> None:
        """Do nothing, as there is no bar."""

    def set_postfix(self, *_: object, **__: object) -> None:
        """Do nothing, as there is no bar."""


def report_steps(pipeline: DiffusionPipeline, report: Callable[[float], None]) -> None:
    """Make the calls of `pipeline` report their steps to `report` in place of showing a bar.

    The attribute hides the method; set it on a copy of a user's pipeline.
    """
    pipeline.progress_bar = partial(StepBar, report)
