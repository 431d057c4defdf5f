"""How much of a stage is done, and how long the rest takes."""

from __future__ import annotations

import pytest

from stepquant.support.progress_task import Task, clock_time


def test_the_time_left_follows_the_mean_pace():
    task = Task("sampling", total=10, started=100.0)
    assert task.left(130.0) is None  # nothing is done yet
    task.advance(2)
    assert task.left(130.0) == pytest.approx(8 * 15)


def test_a_share_of_a_unit_counts_until_the_unit_is_finished():
    task = Task("sampling", total=10)
    task.within(2.5)
    assert task.done == 2.5
    assert task.left(5.0) == pytest.approx(7.5 * 2)
    task.advance(4)
    assert task.done == 4


def test_units_of_an_earlier_run_do_not_speed_up_the_estimate():
    task = Task("distilling blocks", total=10)
    task.advance(5, resumed=True)
    assert task.left(1.0) is None
    task.advance()
    assert task.done == 6
    assert task.left(60.0) == pytest.approx(4 * 60)


def test_a_stage_of_unknown_length_has_no_time_left():
    task = Task("opening", total=None)
    task.advance()
    assert task.left(10.0) is None


def test_more_units_than_expected_leave_no_negative_time():
    task = Task("sampling", total=2)
    task.advance(3)
    assert task.left(6.0) == 0.0


def test_changes_are_told_with_the_note():
    seen = []
    task = Task("packing", 2, changed=lambda task: seen.append((task.done, task.note)))
    task.within(0.5)
    task.advance(note="conv_in")
    assert seen == [(0.5, ""), (1, "conv_in")]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00"), (59.6, "1:00"), (125, "2:05"), (3599.7, "1:00:00"), (3725, "1:02:05")],
)
def test_times_are_minutes_and_seconds(seconds, text):
    assert clock_time(seconds) == text
