"""One stage of work: how much of it is done, and how long the rest takes."""

from __future__ import annotations

from collections.abc import Callable


class Task:
    """A stage of `total` units, or of unknown length if `total` is None.

    Attributes:
        description: What the stage does, as "sampling 64 images".
        total: Number of units, or None.
        done: Finished units. A unit in progress counts by its finished share.
        note: Remark on the last finished unit.
        started: Time at the start in seconds, by the clock of the reporter.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        started: float = 0.0,
        changed: Callable[[Task], None] = lambda _: None,
    ) -> None:
        """`changed` is called with the task after each change."""
        self.description = description
        self.total = total
        self.note = ""
        self.started = started
        self._changed = changed
        self._whole, self._part = 0, 0.0
        self._resumed = 0

    @property
    def done(self) -> float:
        """Finished units, with the finished share of those in progress."""
        return self._whole + self._part

    def advance(self, count: int = 1, note: str = "", resumed: bool = False) -> None:
        """Count `count` units as finished, and show `note`.

        `resumed`: an earlier run finished them, so they say nothing about the pace of this one.
        """
        self._whole, self._part = self._whole + count, 0.0
        if resumed:
            self._resumed += count
        self.note = note
        self._changed(self)

    def within(self, units: float) -> None:
        """Note that `units` more than those counted are done; the next `advance` replaces this."""
        self._part = units
        self._changed(self)

    def left(self, now: float) -> float | None:
        """Seconds that the rest takes at the mean pace so far; None if that is unknown."""
        fresh = self.done - self._resumed
        if self.total is None or fresh <= 0:
            return None
        return max(0.0, self.total - self.done) * (now - self.started) / fresh


def clock_time(seconds: float) -> str:
    """`seconds` as minutes and seconds, "2:05", or hours, minutes and seconds, "1:02:05"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
