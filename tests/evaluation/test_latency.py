from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepquant.evaluation import Timing, measure_latency, ratios
from stepquant.support.errors import StepQuantError


class Clock:
    """A clock that only the callables under test move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def takes(self, *seconds):
        """A callable whose calls take these times in turn, over and over."""
        count = 0

        def work():
            nonlocal count
            self.now += seconds[count % len(seconds)]
            count += 1

        return work


def test_median_and_percentiles_by_hand():
    clock = Clock()
    seconds = [0.001 * k for k in range(1, 12)]  # 1 to 11 ms
    timing = measure_latency({"a": clock.takes(*seconds)}, repeats=11, warmup=0, clock=clock)["a"]
    assert timing.median_ms == pytest.approx(6)
    assert timing.p10 == pytest.approx(2)
    assert timing.p90 == pytest.approx(10)
    assert timing.runs == 11


def test_each_callable_gets_its_own_time():
    clock = Clock()
    work = {"fast": clock.takes(0.002), "slow": clock.takes(0.006)}
    timings = measure_latency(work, repeats=4, warmup=1, clock=clock)
    assert list(timings) == ["fast", "slow"]
    assert timings["fast"].median_ms == pytest.approx(2)
    assert timings["slow"].median_ms == pytest.approx(6)


def test_warmup_is_run_and_not_timed():
    clock = Clock()
    work = {"a": clock.takes(9.0, 9.0, 0.001, 0.001, 0.001)}
    timing = measure_latency(work, repeats=3, warmup=2, clock=clock)["a"]
    assert timing == Timing(*[pytest.approx(1)] * 3, runs=3)


def test_calls_that_lead_up_to_a_timed_one_are_its_own_and_not_timed():
    clock, order = Clock(), []
    work = {"a": clock.takes(9.0, 9.0, 0.001, 9.0, 9.0, 0.001), "b": lambda: order.append("b")}
    timings = measure_latency(work, repeats=2, warmup=0, leads=2, clock=clock)
    assert timings["a"] == Timing(*[pytest.approx(1)] * 3, runs=2)
    assert len(order) == 6


def test_rounds_are_interleaved_and_start_in_turn():
    order = []
    work = {name: (lambda name=name: order.append(name)) for name in "abc"}
    measure_latency(work, repeats=3, warmup=1)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_a_slow_spell_of_the_machine_leaves_the_ratio():
    clock = Clock()
    work = {"a": clock.takes(0.001, 0.005, 0.001), "b": clock.takes(0.002, 0.010, 0.002)}
    timings = measure_latency(work, repeats=9, warmup=0, clock=clock)
    assert ratios(timings, "b") == {"a": pytest.approx(2), "b": 1.0}


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30))
def test_percentiles_are_in_order_and_within_the_runs(microseconds):
    ends = iter([t for end in accumulate(microseconds) for t in (end, end)])
    ticks = iter([0, *ends])  # start, end = start, end, ...
    timing = measure_latency(
        {"a": lambda: None}, len(microseconds), warmup=0, clock=lambda: next(ticks) * 1e-6
    )["a"]
    slack = 1e-6 * timing.p90
    assert min(microseconds) / 1e3 - slack <= timing.p10 <= timing.median_ms + slack
    assert timing.median_ms <= timing.p90 + slack <= max(microseconds) / 1e3 + 3 * slack


def test_ratios_are_medians_over_medians():
    timings = {"float32": Timing(30.0, 29, 33, 5), "w8a8": Timing(12.0, 11, 40, 5)}
    assert ratios(timings, "float32") == {"float32": 1.0, "w8a8": 2.5}


def test_what_a_callable_raises_goes_through():
    def broken():
        raise KeyError("layer")

    with pytest.raises(KeyError, match="layer"):
        measure_latency({"a": broken}, repeats=1, warmup=0)


@pytest.mark.parametrize(
    ("callables", "repeats", "warmup", "leads", "message"),
    [
        ({}, 1, 0, 0, "no callables to time"),
        ({"a": int}, 0, 0, 0, "repeats is 0"),
        ({"a": int}, 1, -1, 0, "warmup -1"),
        ({"a": int}, 1, 0, -1, "leads -1"),
    ],
)
def test_nothing_to_time(callables, repeats, warmup, leads, message):
    with pytest.raises(StepQuantError, match=message):
        measure_latency(callables, repeats, warmup, leads)


def test_ratios_of_an_unknown_baseline():
    with pytest.raises(StepQuantError, match="'float32' was not timed: expected one of a, b"):
        ratios({"a": Timing(1, 1, 1, 1), "b": Timing(1, 1, 1, 1)}, "float32")


def test_ratios_of_a_time_of_zero():
    with pytest.raises(StepQuantError, match="'a' took 0 ms"):
        ratios({"a": Timing(0, 0, 0, 1), "b": Timing(1, 1, 1, 1)}, "b")
