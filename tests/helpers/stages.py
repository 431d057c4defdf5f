"""A reporter that keeps the stages of a run."""

from __future__ import annotations

from contextlib import contextmanager

from stepquant.support.progress import Reporter


class Stages(Reporter):
    """Shows nothing. `seen` has each stage's `done` after every change, by its description."""

    def __init__(self):
        super().__init__(quiet=True)
        self.seen = {}
        self.totals = {}

    @contextmanager
    def task(self, description, total):
        seen = self.seen.setdefault(description, [])
        self.totals[description] = total
        with super().task(description, total) as task:
            task._changed = lambda task: seen.append(task.done)
            yield task

    def check_complete(self):
        """Every stage with a total ended at its total."""
        for description, total in self.totals.items():
            if total is not None:
                assert self.seen[description][-1] == total, description
