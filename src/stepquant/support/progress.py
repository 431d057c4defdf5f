"""Progress output: bars with the remaining time, and lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Task:
    """One progress bar of `total` units."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=total, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Advance the bar by `count` units and show `note` at its end."""
        self._progress.update(self._task, advance=count, note=note)


class Reporter:
    """Prints progress bars and lines to standard error; prints nothing if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet)

    def line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Task]:
        """Show a bar of `total` units with elapsed and remaining time; it disappears at the end.

        The bar is shown only on a terminal.
        """
        with Progress(
            TextColumn(f"{description:<34}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=self.quiet or not self.console.is_terminal,
        ) as progress:
            yield Task(progress, total)
