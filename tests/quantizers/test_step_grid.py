from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from stepquant.quantizers import StepContext, StepGrid
from stepquant.support.errors import StepQuantError

DESCENDING = torch.tensor([900.0, 600.0, 300.0, 0.0])


@pytest.mark.parametrize(
    ("timestep", "rows"),
    [
        (600, [1]),
        (599.4, [1]),
        (torch.tensor(300), [2]),
        (torch.tensor(310.0), [2]),
        (torch.tensor(20, dtype=torch.int32), [3]),
        (torch.tensor(910.0, dtype=torch.float64), [0]),
        (torch.tensor([900, 0, 0, 600]), [0, 3, 3, 1]),
        (torch.tensor([760.0, 740.0]), [0, 1]),
        (torch.tensor([620.0], dtype=torch.float16), [1]),
        (-50, [3]),
        (5000, [0]),
    ],
    ids=[
        "int",
        "float",
        "scalar-int64",
        "scalar-float32",
        "scalar-int32",
        "scalar-float64",
        "batch-int64",
        "batch-float32",
        "batch-of-one-float16",
        "below-the-grid",
        "above-the-grid",
    ],
)
def test_rows_are_those_of_the_nearest_timestep(timestep: Tensor | float, rows: list[int]) -> None:
    found = StepGrid(DESCENDING).rows(timestep)
    assert found.dtype == torch.int64
    assert found.tolist() == rows


@pytest.mark.parametrize("timestep", [750, 750.0, torch.tensor([750])], ids=str)
def test_midway_the_row_that_comes_first_wins(timestep: Tensor | float) -> None:
    assert StepGrid(DESCENDING).rows(timestep).tolist() == [0]
    assert StepGrid(DESCENDING.flip(0)).rows(timestep).tolist() == [2]


@pytest.mark.parametrize(
    "timestep",
    [torch.tensor(300), torch.tensor([300]).expand(4), torch.tensor([300, 310, 290, 300])],
    ids=["scalar", "expanded", "alike"],
)
def test_samples_that_agree_have_one_row(timestep: Tensor) -> None:
    context = StepContext(StepGrid(DESCENDING))
    context.set_timestep(timestep)
    assert context.rows.tolist() == [2]


def test_a_compiled_graph_does_not_branch_on_timesteps() -> None:
    """An expanded number is seen to be one; numbers of their own keep a row each."""
    context = StepContext(StepGrid(DESCENDING))

    @torch.compile(backend="eager", fullgraph=True)
    def rows(timestep: Tensor) -> Tensor:
        context.set_timestep(timestep)
        return context.rows + 0

    assert rows(torch.tensor([300]).expand(4)).tolist() == [2]
    assert rows(torch.tensor([300, 310, 900])).tolist() == [2, 2, 0]


@pytest.mark.parametrize("steps", [4, 10, 20, 37, 100])
def test_other_step_counts_find_the_nearest_calibrated_step(steps: int) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(20)
    grid = StepGrid(scheduler.timesteps)
    calibrated = scheduler.timesteps.tolist()
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        row = int(grid.rows(timestep))
        distance = abs(calibrated[row] - int(timestep))
        assert distance == min(abs(other - int(timestep)) for other in calibrated)


def test_a_recorded_timestep_finds_its_own_row() -> None:
    timesteps = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:100]
    grid = StepGrid(timesteps)
    assert len(grid) == 100
    assert grid.rows(timesteps).tolist() == list(range(100))


@pytest.mark.parametrize(
    ("timesteps", "found"),
    [
        (torch.zeros(0), r"shape \(0,\): expected one dimension with at least one timestep"),
        (torch.tensor(5.0), r"shape \(\): expected one dimension"),
        (torch.zeros(2, 2), r"shape \(2, 2\): expected one dimension"),
        (torch.tensor([1.0, 2.0, 1.0]), "twice .*: expected distinct finite timesteps"),
        (torch.tensor([1.0, float("nan")]), "not finite: expected distinct finite"),
        (torch.tensor([1.0, float("inf")]), "not finite: expected distinct finite"),
    ],
    ids=["empty", "scalar", "two-dimensions", "twice", "nan", "infinity"],
)
def test_a_bad_grid_is_refused(timesteps: Tensor, found: str) -> None:
    with pytest.raises(StepQuantError, match=f"step grid .*{found}"):
        StepGrid(timesteps)


class Denoiser(nn.Module):
    """Gives back the rows that its context holds while it runs."""

    def __init__(self, context: StepContext) -> None:
        super().__init__()
        self.context = context
        self.calls = 0

    def forward(self, sample: Tensor, timestep: Any = None, scale: float = 1.0) -> list[int]:
        self.calls += 1
        return self.context.rows.tolist()


@pytest.fixture
def denoiser() -> Denoiser:
    context = StepContext(StepGrid(DESCENDING))
    denoiser = Denoiser(context)
    context.attach(denoiser)
    return denoiser


@pytest.mark.parametrize(
    ("timestep", "rows"),
    [
        (600, [1]),
        (torch.tensor(300.0), [2]),
        (torch.tensor([0]), [3]),
        (torch.tensor([0, 900, 0]), [3, 0, 3]),
        (torch.tensor([600, 600, 600]), [1]),
    ],
    ids=["int", "scalar", "batch-of-one", "mixed-batch", "equal-batch"],
)
def test_the_hook_reads_the_timestep_by_position_and_by_name(
    denoiser: Denoiser, timestep: Tensor | int, rows: list[int]
) -> None:
    sample = torch.zeros(3, 1)
    assert denoiser(sample, timestep) == rows
    denoiser.context.set_timestep(900)
    assert denoiser(sample, timestep=timestep) == rows
    denoiser.context.set_timestep(900)
    assert denoiser(scale=2.0, timestep=timestep, sample=sample) == rows


def test_the_row_depends_on_the_argument_and_not_on_the_number_of_calls(
    denoiser: Denoiser,
) -> None:
    seen = [denoiser(torch.zeros(1), timestep) for timestep in (0, 900, 300, 300, 600, 0)]
    assert seen == [[3], [0], [2], [2], [1], [3]]


def test_contexts_do_not_know_of_each_other(denoiser: Denoiser) -> None:
    other_context = StepContext(StepGrid(torch.tensor([0.0, 600.0])))
    other = Denoiser(other_context)
    other_context.attach(other)
    assert denoiser(torch.zeros(1), 600) == [1]
    assert other(torch.zeros(1), 0) == [0]
    assert denoiser.context.rows.tolist() == [1]


def test_a_deep_copy_reads_into_its_own_context(denoiser: Denoiser) -> None:
    twin = copy.deepcopy(denoiser)
    assert denoiser(torch.zeros(1), 600) == [1]
    assert twin(torch.zeros(1), 300) == [2]
    assert denoiser.context.rows.tolist() == [1]


def test_a_removed_hook_reads_nothing() -> None:
    context = StepContext(StepGrid(DESCENDING))
    denoiser = Denoiser(context)
    context.attach(denoiser).remove()
    assert denoiser(torch.zeros(1), 600) == [0]


@pytest.mark.parametrize("arguments", [{}, {"timestep": None}], ids=["left-out", "none"])
def test_a_call_without_timestep_is_refused(denoiser: Denoiser, arguments: dict[str, None]) -> None:
    with pytest.raises(StepQuantError, match="called without a timestep: expected one"):
        denoiser(torch.zeros(1), **arguments)
    assert denoiser.calls == 0


def test_a_model_that_takes_no_timestep_is_refused() -> None:
    context = StepContext(StepGrid(DESCENDING))
    with pytest.raises(
        StepQuantError, match=r"Linear\.forward has the arguments \(input\): expected one called"
    ):
        context.attach(nn.Linear(2, 2))
