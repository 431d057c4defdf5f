"""State of calls: one for each thread and for each nested call, whatever ends a call."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

from concurrent_calls import at_once
from stepquant.quantizers import StepContext, StepGrid
from stepquant.support.errors import StepQuantError

STEPS = torch.tensor([900.0, 600.0, 300.0, 0.0])


class Denoiser(nn.Module):
    """Gives back the rows that it sees before and after `inside` runs in the middle of its call."""

    def __init__(self) -> None:
        super().__init__()
        self.context = StepContext(StepGrid(STEPS))
        self.context.attach(self)

    def forward(self, sample: Tensor, timestep: float, inside=None) -> list[list[int]]:
        before = self.context.rows.tolist()
        if inside is not None:
            inside()
        return [before, self.context.rows.tolist()]


X = torch.zeros(1)


@pytest.fixture
def denoiser() -> Denoiser:
    return Denoiser()


def test_each_thread_has_its_rows(denoiser):
    meet = threading.Barrier(4)
    calls = [lambda step=step: denoiser(X, step, lambda: meet.wait(60)) for step in STEPS.tolist()]
    assert at_once(*calls) == [[[row], [row]] for row in range(4)]


def test_a_nested_call_gives_the_rows_back(denoiser):
    found = []
    inner = lambda: found.append(denoiser(X, 0.0, lambda: found.append(denoiser(X, 600.0))))  # noqa: E731
    assert denoiser(X, 300.0, inner) == [[2], [2]]
    assert found == [[[1], [1]], [[3], [3]]]
    assert denoiser.context.rows.tolist() == [2]  # those of the outermost call


def fail(error: type[BaseException]) -> None:
    raise error("in the middle")


def attempt(denoiser: Denoiser, error: type[BaseException]) -> None:
    with pytest.raises(error):
        denoiser(X, 0.0, lambda: fail(error))


def test_a_nested_call_that_fails_gives_the_rows_back(denoiser):
    assert denoiser(X, 300.0, lambda: attempt(denoiser, ValueError)) == [[2], [2]]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_nothing_behind(denoiser, error):
    attempt(denoiser, error)  # no hook runs after KeyboardInterrupt
    assert denoiser(X, 600.0) == [[1], [1]]
    assert denoiser.context.rows.tolist() == [1]
    assert denoiser.context._here.state._calls is None


def test_a_hook_that_fails_before_the_context_looks_ends_no_other_call(denoiser):
    def attempt_before() -> None:
        handle = denoiser.register_forward_pre_hook(lambda *_: fail(ValueError), prepend=True)
        with pytest.raises(ValueError, match="in the middle"):
            denoiser(X, 0.0)
        handle.remove()
        assert denoiser(X, 600.0) == [[1], [1]]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert denoiser(X, 300.0, attempt_before) == [[2], [2]]


def test_a_call_without_timestep_ends_too(denoiser):
    with pytest.raises(StepQuantError, match="without a timestep"):
        denoiser(X, None)
    assert denoiser.context._here.state._calls is None


def test_calls_of_one_thread_may_take_turns(denoiser):
    """As generators do, and tasks of asyncio."""

    def sampler(steps):
        for step in steps:
            yield denoiser(X, step)

    pairs = list(zip(sampler([900.0, 0.0]), sampler([300.0, 600.0]), strict=True))
    assert pairs == [([[0], [0]], [[2], [2]]), ([[3], [3]], [[1], [1]])]


def test_threads_without_rows_have_those_of_the_only_other_one(denoiser):
    """Autograd runs checkpointed blocks again in threads of its own."""
    (default,) = at_once(lambda: denoiser.context.rows.tolist())
    assert default == [0]
    denoiser(X, 300.0)
    assert at_once(lambda: denoiser.context.rows.tolist()) == [[2]]


def test_with_several_to_choose_from_there_is_an_error(denoiser):
    denoiser(X, 300.0)
    at_once(lambda: denoiser(X, 0.0))
    with pytest.raises(StepQuantError, match=r"in a thread that has no timestep, .*: expected a"):
        at_once(lambda: denoiser.context.rows)
    assert denoiser.context.rows.tolist() == [2]
    (found,) = at_once(lambda: denoiser(X, 600.0))
    assert found == [[1], [1]]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_the_rows_of_the_thread_that_makes_them(denoiser, copied):
    denoiser.context.set_timestep(300.0)
    (other,) = at_once(lambda: (denoiser.context.set_timestep(0.0), copied(denoiser))[1])
    twin = copied(denoiser)
    assert [each.context.rows.tolist() for each in (denoiser, twin)] == [[2], [2]]
    assert other.context.rows.tolist() == [3]
    assert (twin(X, 600.0), denoiser.context.rows.tolist()) == ([[1], [1]], [2])


def test_both_hooks_are_removed(denoiser):
    other = StepContext(StepGrid(STEPS))
    hooks = (denoiser._forward_pre_hooks, denoiser._forward_hooks)
    before = [list(each.values()) for each in hooks]
    other.attach(denoiser).remove()
    assert [list(each.values()) for each in hooks] == before
    assert len(denoiser._forward_hooks_always_called) == 1
