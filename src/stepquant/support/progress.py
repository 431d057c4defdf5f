"""Progress output: bars on terminals, plain lines elsewhere, both with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Task as Bar
from rich.text import Text

from stepquant.support.progress_lines import ProgressLines, Ticker
from stepquant.support.progress_task import Task, clock_time

Item = TypeVar("Item")


class Reporter:
    """Reports progress and remarks on standard error; prints nothing if `quiet`.

    On a terminal, each running stage has a bar. Elsewhere a stage prints a plain line about every
    10 seconds, and one at its end if it took more than 2 seconds; see `progress_lines`.
    """

    def __init__(self, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet)
        self._clock = clock
        self._tasks: list[Task] = []
        self._bars = _Bars(self.console, clock)
        self._lines = ProgressLines(self.line, clock)

    @property
    def shows_bars(self) -> bool:
        """Whether standard error is a terminal on which a bar can move.

        `FORCE_COLOR` makes rich take a pipe for a terminal; bars would fill a log with escape
        codes.
        """
        return self.console.is_interactive and self.console.file.isatty()

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int | None) -> Iterator[Task]:
        """Report a stage of `total` units; None if its length is unknown.

        Stages may lie inside one another. Bars disappear at the end of their stage.
        """
        show = self._nothing if self.quiet else self._bar if self.shows_bars else self._plain
        with show(description, total) as task:
            self._tasks.append(task)
            try:
                yield task
            finally:
                self._tasks.remove(task)

    def within(
        self, items: Sequence[Item], span: tuple[float, float] = (0.0, 1.0)
    ) -> Iterator[Item]:
        """Iterate over `items`, and report each as a share of the innermost stage's next unit.

        `span`: which part of the unit all items together are.
        """
        first, last = span
        for number, item in enumerate(items, 1):
            yield item
            if self._tasks:
                self._tasks[-1].within(first + (last - first) * number / len(items))

    @contextmanager
    def _nothing(self, description: str, total: int | None) -> Iterator[Task]:
        yield Task(description, total)

    @contextmanager
    def _bar(self, description: str, total: int | None) -> Iterator[Task]:
        task = Task(description, total, self._clock(), self._bars.update)
        self._bars.begin(task)
        try:
            yield task
        finally:
            self._bars.end(task)

    @contextmanager
    def _plain(self, description: str, total: int | None) -> Iterator[Task]:
        task = Task(description, total, self._clock())
        ticker = None if self._tasks else Ticker(self._lines.tick)
        self._lines.begin(task)
        if ticker is not None:
            ticker.start()
        finished = False
        try:
            yield task
            finished = True
        finally:
            if ticker is not None:
                ticker.stop()
            self._lines.end(task, finished)


class _Bars:
    """The bars of all running stages, in one display: rich allows one at a time."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._progress: Progress | None = None
        self._numbers: dict[Task, TaskID] = {}

    def begin(self, task: Task) -> None:
        """Show the bar of `task` below the others."""
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description:<34}"),
                BarColumn(24),
                _Count(),
                TimeElapsedColumn(),
                _TimeLeft(self._clock),
                TextColumn("{task.fields[note]}"),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        self._numbers[task] = self._progress.add_task(
            task.description, total=task.total, note="", stage=task
        )

    def update(self, task: Task) -> None:
        """Move the bar of `task`."""
        if self._progress is not None:
            self._progress.update(self._numbers[task], completed=task.done, note=task.note)

    def end(self, task: Task) -> None:
        """Remove the bar of `task`."""
        assert self._progress is not None
        self._progress.remove_task(self._numbers.pop(task))
        if not self._numbers:
            self._progress.stop()
            self._progress = None


class _Count(ProgressColumn):
    """Finished units of all, as "12/64"; nothing for a stage of unknown length."""

    def render(self, bar: Bar) -> Text:
        return Text("" if bar.total is None else f"{int(bar.completed)}/{int(bar.total)}")


class _TimeLeft(ProgressColumn):
    """The time left at the stage's mean pace.

    rich's own column knows a pace only if two units finish within 30 seconds.
    """

    max_refresh = 0.5

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def render(self, bar: Bar) -> Text:
        stage: Any = bar.fields["stage"]
        left = stage.left(self._clock())
        if left is not None:
            return Text(f"left {clock_time(left)}")
        return Text("" if stage.total is None else "left -:--")
