"""Progress as plain lines of text, for output that is no terminal: pipes, CI, notebooks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from stepquant.support.progress_task import Task, clock_time

FIRST_AFTER = 5.0  # seconds of a stage before its first line
EVERY = 10.0  # seconds from one line to the next
REPORTED_FROM = 2.0  # seconds that a stage takes at least to get a line at its end
MOST, PER = 6, 60.0  # lines in so many seconds; a stage that has printed may end one beyond


class ProgressLines:
    """Decides when a line is due, and prints it.

    Stages may lie inside one another; the innermost one prints while it lasts. `print_line` gets
    complete lines without carriage returns or escape codes.
    """

    def __init__(self, print_line: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._print, self._clock = print_line, clock
        self._running: list[Task] = []
        self._reported: set[Task] = set()
        self._times: deque[float] = deque(maxlen=MOST)  # of the last lines
        self._lock = threading.Lock()

    def begin(self, task: Task) -> None:
        """Take `task` as the innermost stage."""
        with self._lock:
            self._running.append(task)

    def tick(self) -> None:
        """Print a line of the innermost stage if one is due."""
        with self._lock:
            if not self._running:
                return
            task, now = self._running[-1], self._clock()
            waited = not self._times or now - self._times[-1] >= EVERY
            if waited and now - task.started >= FIRST_AFTER and self._has_room(now):
                self._reported.add(task)
                self._line(running_line(task, now), now)

    def end(self, task: Task, finished: bool) -> None:
        """Close `task`, and print its last line if it took long and is `finished`.

        A stage that stops with an error prints nothing: the error says what happened.
        """
        with self._lock:
            self._running.remove(task)
            now = self._clock()
            reported = task in self._reported
            self._reported.discard(task)
            long = now - task.started > REPORTED_FROM
            if finished and long and (reported or self._has_room(now)):
                self._line(last_line(task, now), now)

    def _has_room(self, now: float) -> bool:
        return len(self._times) < MOST or now - self._times[0] >= PER

    def _line(self, text: str, now: float) -> None:
        self._times.append(now)
        self._print(text)


def running_line(task: Task, now: float) -> str:
    """As "sampling 64 images: 12/64 (19%), 0:32 elapsed, 2:19 left"."""
    elapsed = f"{clock_time(now - task.started)} elapsed"
    if task.total is None:
        return f"{task.description}: {elapsed}"
    share = task.done / max(1, task.total)
    left = task.left(now)
    rest = "time left unknown" if left is None else f"{clock_time(left)} left"
    return f"{task.description}: {int(task.done)}/{task.total} ({share:.0%}), {elapsed}, {rest}"


def last_line(task: Task, now: float) -> str:
    """As "sampling 64 images: 64/64, done in 2:51"."""
    count = "" if task.total is None else f"{int(task.done)}/{task.total}, "
    return f"{task.description}: {count}done in {clock_time(now - task.started)}"


class Ticker:
    """Calls `tick` once a second from a thread of its own, also while one unit takes long."""

    SECONDS = 1.0

    def __init__(self, tick: Callable[[], None]) -> None:
        self._tick = tick
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stepquant-progress", daemon=True)

    def start(self) -> None:
        """Begin to call."""
        self._thread.start()

    def stop(self) -> None:
        """Call no more; returns when the last call has ended."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self.SECONDS):
            self._tick()
