"""Progress on standard error: bars on terminals, plain lines elsewhere, nothing if quiet."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from stepquant.support.progress import Reporter


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves; no thread looks at it in between."""
    monkeypatch.setattr("stepquant.support.progress.Ticker.start", lambda self: None)
    monkeypatch.setattr("stepquant.support.progress.Ticker.stop", lambda self: None)

    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def redraw(reporter):
    """Draw the bars now; a thread of rich does so ten times a second."""
    reporter._bars._progress.refresh()


def run_a_stage(reporter, clock, seconds):
    with reporter.task("sampling 4 images", total=4) as task:
        clock.now += seconds / 2
        task.advance(2)
        clock.now += seconds / 2
        task.advance(2)


@pytest.mark.parametrize("forced", [False, True])
def test_a_pipe_gets_whole_lines_only(clock, capsys, monkeypatch, forced):
    if forced:  # as many CI services do
        monkeypatch.setenv("FORCE_COLOR", "1")
    run_a_stage(Reporter(clock=clock), clock, 40)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "sampling 4 images: 4/4, done in 0:40\n"


def test_a_quick_stage_prints_nothing_to_a_pipe(clock, capsys):
    run_a_stage(Reporter(clock=clock), clock, 1)
    assert capsys.readouterr() == ("", "")


def test_a_stage_that_fails_prints_no_last_line(clock, capsys):
    with pytest.raises(KeyboardInterrupt), Reporter(clock=clock).task("sampling", 4):
        clock.now = 60.0
        raise KeyboardInterrupt
    assert capsys.readouterr() == ("", "")


def test_a_quiet_reporter_prints_nothing(clock, terminal):
    with redirect_stderr(terminal):
        run_a_stage(Reporter(quiet=True, clock=clock), clock, 40)
    assert terminal.getvalue() == ""


def test_a_dumb_terminal_gets_lines(clock, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(terminal):
        run_a_stage(Reporter(clock=clock), clock, 40)
    assert terminal.getvalue() == "sampling 4 images: 4/4, done in 0:40\n"


def test_a_terminal_gets_a_bar_with_the_time_left(clock, terminal):
    with redirect_stderr(terminal):
        reporter = Reporter(clock=clock)
        with reporter.task("sampling 4 images", total=4) as task:
            clock.now = 100.0
            task.advance(1, note="first")
            redraw(reporter)
            reporter.line("a remark")
    shown = terminal.getvalue()
    assert "1/4" in shown and "left 5:00" in shown and "first" in shown and "a remark\n" in shown
    assert "done in" not in shown


def test_bars_of_stages_in_stages_share_one_display(clock, terminal):
    with redirect_stderr(terminal):
        reporter = Reporter(clock=clock)
        with reporter.task("step 1 of 2, smoothing", total=None):
            with reporter.task("observing activations", total=2) as task:
                task.advance()
                redraw(reporter)
                reporter.line("both")
            reporter.line("outer")
        with reporter.task("packing", total=1):
            reporter.line("next")
    shown = terminal.getvalue()
    assert all(text in shown for text in ("smoothing", "observing activations", "1/2", "packing"))


def test_items_within_a_unit_move_the_innermost_stage():
    reporter, seen = Reporter(quiet=True), []
    with reporter.task("distilling blocks", total=2) as task:
        for _ in reporter.within("abcd"):
            seen.append(task.done)
        task.advance()
        for _ in reporter.within("ab", span=(0.0, 0.8)):
            seen.append(task.done)
        for _ in reporter.within("ab", span=(0.8, 1.0)):
            seen.append(task.done)
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.4, 1.8, 1.9])


def test_items_without_a_stage_are_just_items():
    assert list(Reporter(quiet=True).within("abc")) == ["a", "b", "c"]
