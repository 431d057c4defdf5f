"""Tensors of a calibration set in files: the same numbers, and nothing left behind."""

from __future__ import annotations

import errno
import mmap
import os

import pytest
import torch

from quantize_runs import left, refused
from stepquant.calibration.block_inputs import capture_inputs, capture_outputs
from stepquant.calibration.spill import Rows, Spill
from stepquant.calibration.trajectories import Trajectories
from stepquant.support.process_memory import peak_memory_mb, reset_peak_memory


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.second = torch.nn.Linear(4, 3)

    def forward(self, sample, timestep):
        return self.second(self.first(sample).relu())


@pytest.fixture
def data():
    torch.manual_seed(0)
    return Trajectories(torch.randn(7, 3), torch.zeros(7), torch.arange(7), torch.zeros(1))


def test_only_tensors_that_are_large_enough_are_spilled(tmp_path):
    spill = Spill(tmp_path, at_least=64)
    spill.empty((15,), torch.float32)
    assert len(spill._maps) == 0
    large = spill.empty((4, 4), torch.float32)
    assert len(spill._maps) == 1 and large.shape == (4, 4)
    assert len(Spill(None)._maps) == 0


def test_what_was_written_is_read_after_it_was_released(tmp_path):
    spill = Spill(tmp_path)
    wanted = torch.randn(300, 1000)
    tensor = spill.empty(wanted.shape, torch.float32)
    tensor.copy_(wanted)
    spill.release()
    assert torch.equal(tensor, wanted)
    assert torch.equal(tensor[[5, 2]], wanted[[5, 2]])


def test_systems_without_posix_fallocate_and_madvise_read_the_same(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(mmap, "MADV_DONTNEED")
    spill = Spill(tmp_path)
    wanted = torch.randn(3, 100_000)  # more than one block of zeros, and not a whole number of them
    tensor = spill.empty(wanted.shape, torch.float32)
    assert not tensor.any()
    tensor.copy_(wanted)
    spill.release()
    assert torch.equal(tensor, wanted)


def test_a_file_has_no_name_and_its_room_is_free_once_the_tensor_is_gone(tmp_path):
    spill = Spill(tmp_path)
    tensor = spill.empty((1000,), torch.bfloat16)
    assert left(tmp_path) == [] and tensor.dtype == torch.bfloat16
    view = tensor[3:]
    del tensor
    assert len(spill._maps) == 1
    del view
    assert len(spill._maps) == 0


def test_a_full_disk_is_told_before_it_is_written_to(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = refused(lambda: Spill(tmp_path).empty((1 << 20,), torch.float32))
    assert "has no room for 0.0 GiB of activations (No space left on device)" in message
    assert left(tmp_path) == []


def test_rows_are_joined_in_order():
    rows = Rows(5, Spill())
    parts = torch.arange(10).view(5, 2)
    for part in parts.split(2):
        rows.add(part)
    assert torch.equal(rows.joined(), parts)


def test_what_was_released_does_not_count_as_memory(tmp_path):
    if not reset_peak_memory():
        pytest.skip("the system cannot reset the high-water mark of a process")
    before, spill = peak_memory_mb(), Spill(tmp_path)
    rows = Rows(64, spill)
    for number in range(64):
        rows.add(torch.full((1, 1 << 20), float(number)))
    for number, row in enumerate(rows.joined().split(1)):
        assert float(row.mean()) == number
        spill.release()
    assert peak_memory_mb() - before < 64  # of 268 MB


@pytest.mark.parametrize("batch", [1, 3, 7, 9])
def test_captured_inputs_and_outputs_are_the_same_in_files(tmp_path, data, batch):
    model, spill = Model(), Spill(tmp_path)
    found = capture_outputs(model, ["first", "second"], data, batch, spill)
    wanted = capture_outputs(model, ["first", "second"], data, batch)
    assert len(spill._maps) == 2
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (inputs,), _ = capture_inputs(model, "second", data, batch, {"first": found["first"]}, spill)
    (plain,), _ = capture_inputs(model, "second", data, batch)
    assert len(spill._maps) == 3
    assert torch.equal(inputs, plain)
