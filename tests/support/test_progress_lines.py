"""Plain lines of progress: when they come, and what they say."""

from __future__ import annotations

import pytest

from stepquant.support.progress_lines import ProgressLines, Ticker
from stepquant.support.progress_task import Task


class Run:
    """Stages on a fake clock that ticks each second; `printed` has `(second, line)`."""

    def __init__(self):
        self.now = 0.0
        self.printed = []
        self.lines = ProgressLines(
            lambda text: self.printed.append((self.now, text)), lambda: self.now
        )

    def stage(self, seconds, description="working", total=None, finished=True):
        """A stage of `seconds` that finishes a unit each second, if it has any."""
        task = Task(description, total, self.now)
        self.lines.begin(task)
        for _ in range(seconds):
            self.now += 1
            if total is not None:
                task.advance()
            self.lines.tick()
        self.lines.end(task, finished)

    def times(self):
        return [second for second, _ in self.printed]


def test_a_long_stage_prints_every_ten_seconds_and_at_its_end():
    run = Run()
    run.stage(28, "sampling 28 images", total=28)
    assert run.printed == [
        (5, "sampling 28 images: 5/28 (18%), 0:05 elapsed, 0:23 left"),
        (15, "sampling 28 images: 15/28 (54%), 0:15 elapsed, 0:13 left"),
        (25, "sampling 28 images: 25/28 (89%), 0:25 elapsed, 0:03 left"),
        (28, "sampling 28 images: 28/28, done in 0:28"),
    ]


def test_a_stage_of_unknown_length_says_how_long_it_has_run():
    run = Run()
    run.stage(7, "opening MODEL")
    assert run.printed == [
        (5, "opening MODEL: 0:05 elapsed"),
        (7, "opening MODEL: done in 0:07"),
    ]


def test_a_first_unit_that_takes_long_is_reported_without_an_estimate():
    run = Run()
    task = Task("distilling blocks", 3, 0.0)
    run.lines.begin(task)
    run.now = 40.0
    run.lines.tick()
    assert run.printed == [
        (40, "distilling blocks: 0/3 (0%), 0:40 elapsed, time left unknown"),
    ]


@pytest.mark.parametrize(("seconds", "lines"), [(2, 0), (3, 1), (4, 1)])
def test_a_short_stage_prints_one_line_if_it_took_more_than_two_seconds(seconds, lines):
    run = Run()
    run.stage(seconds)
    assert len(run.printed) == lines


def test_a_stage_that_fails_leaves_the_last_word_to_the_error():
    run = Run()
    run.stage(8, finished=False)
    assert run.times() == [5]


@pytest.mark.parametrize("seconds", [3, 4, 6, 9, 11, 14, 65])
def test_a_minute_has_about_six_lines_however_long_stages_take(seconds):
    run = Run()
    for _ in range(600 // seconds):
        run.stage(seconds)
    times = run.times()
    for end in times:
        assert sum(end - 60 < second <= end for second in times) <= 7
    assert len(times) > 30


def test_a_long_stage_keeps_its_last_line_in_a_busy_minute():
    run = Run()
    run.stage(65, total=65)
    assert run.printed[-1] == (65, "working: 65/65, done in 1:05")


def test_the_innermost_stage_prints_and_the_outer_one_ends_with_a_line():
    run = Run()
    outer = Task("step 1 of 1, smoothing", None, 0.0)
    run.lines.begin(outer)
    run.stage(8, "observing activations", total=8)
    run.now += 1
    run.lines.end(outer, finished=True)
    assert run.printed == [
        (5, "observing activations: 5/8 (62%), 0:05 elapsed, 0:03 left"),
        (8, "observing activations: 8/8, done in 0:08"),
        (9, "step 1 of 1, smoothing: done in 0:09"),
    ]


def test_without_a_stage_nothing_is_printed():
    run = Run()
    run.now = 100.0
    run.lines.tick()
    assert run.printed == []


def test_the_ticker_calls_until_it_is_stopped(monkeypatch):
    monkeypatch.setattr(Ticker, "SECONDS", 0.0)
    calls = []
    enough = []

    def tick():
        calls.append(1)
        if len(calls) == 3:
            ticker._stopped.set()
            enough.append(1)

    ticker = Ticker(tick)
    ticker.start()
    ticker._thread.join(60)
    ticker.stop()
    assert enough and len(calls) == 3
