from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from stepquant.support.errors import StepQuantError
from stepquant.support.work_folder import WorkFolder, apart, fingerprint

JOB = {"recipe": {"name": "mine"}, "seed": 0}
PIECE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.work"


def refused(act) -> str:
    with pytest.raises(StepQuantError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_folder_begins_with_the_job(path):
    WorkFolder(path, JOB, resume=False)
    assert json.loads((path / "job.json").read_text()) == JOB
    assert os.listdir(path) == ["job.json"]


def test_pieces_come_back_bit_by_bit_in_this_run_and_the_next(path):
    work = WorkFolder(path, JOB, resume=False)
    assert work.load("blocks/000-conv_in") is None
    work.save("blocks/000-conv_in", PIECE)
    for folder in (work, WorkFolder(path, JOB, resume=True)):
        found = folder.load("blocks/000-conv_in")
        assert found.keys() == PIECE.keys()
        for name, value in PIECE.items():
            assert torch.equal(found[name], value)
            assert found[name].dtype == value.dtype
    assert work.load("blocks/001") is None


def test_tensors_that_share_memory_or_want_gradients_are_kept_whole(path):
    base = torch.randn(4, 4, requires_grad=True)
    work = WorkFolder(path, JOB, resume=False)
    work.save("piece", {"a": base, "row": base[1], "turned": base.t()})
    found = work.load("piece")
    assert torch.equal(found["row"], base[1])
    assert torch.equal(found["turned"], base.t())


def test_without_a_path_nothing_is_kept():
    work = WorkFolder(None, JOB, resume=True)
    work.save("piece", PIECE)
    assert work.load("piece") is None
    work.remove()


def test_the_work_of_another_job_is_refused(path):
    WorkFolder(path, JOB, resume=False).save("piece", PIECE)
    sentence = refused(lambda: WorkFolder(path, {**JOB, "seed": 1}, resume=True))
    assert sentence.startswith(f"'{path}' holds the work of another job")
    assert WorkFolder(path, JOB, resume=True).load("piece") is not None


@pytest.mark.parametrize("job", [JOB, {**JOB, "seed": 1}], ids=["the same", "another"])
def test_unfinished_work_is_not_overwritten_unasked(path, job):
    WorkFolder(path, JOB, resume=False).save("piece", PIECE)
    sentence = refused(lambda: WorkFolder(path, job, resume=False))
    assert sentence.startswith(f"'{path}' holds an unfinished job: continue with --resume")
    assert (path / "piece.safetensors").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_someone_else_is_refused_and_left_alone(path, resume):
    path.mkdir()
    (path / "thesis.tex").write_text("dear")
    sentence = refused(lambda: WorkFolder(path, JOB, resume))
    assert sentence.startswith(f"'{path}' exists and is not a work folder of stepquant")
    assert os.listdir(path) == ["thesis.tex"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_way_is_refused(path, resume):
    path.write_text("dear")
    assert "is not a work folder" in refused(lambda: WorkFolder(path, JOB, resume))
    assert path.read_text() == "dear"


@pytest.mark.parametrize("left", [[], ["job.json.partial"]], ids=["empty", "half a job.json"])
def test_a_kill_before_the_job_was_written_is_no_hindrance(path, left):
    path.mkdir()
    for name in left:
        (path / name).write_text("{")
    WorkFolder(path, JOB, resume=True)
    assert os.listdir(path) == ["job.json"]


def test_resuming_where_nothing_is_begins(path):
    WorkFolder(path, JOB, resume=True)
    assert (path / "job.json").exists()


@pytest.mark.parametrize("keep", [0, 5, 60, -1], ids=lambda keep: f"{keep} bytes")
def test_a_truncated_piece_is_named(path, keep):
    work = WorkFolder(path, JOB, resume=False)
    work.save("blocks/000-conv_in", PIECE)
    file = path / "blocks" / "000-conv_in.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    sentence = refused(lambda: WorkFolder(path, JOB, resume=True).load("blocks/000-conv_in"))
    assert sentence.startswith(f"'{file}' cannot be read")
    assert "delete it and continue with --resume" in sentence


def test_a_half_written_piece_does_not_count(path):
    work = WorkFolder(path, JOB, resume=False)
    work.save("piece", PIECE)
    (path / "piece.safetensors").rename(path / "piece.safetensors.partial")
    assert work.load("piece") is None
    work.save("piece", PIECE)
    assert sorted(os.listdir(path)) == ["job.json", "piece.safetensors"]


def test_a_full_disk_is_told_and_the_rest_is_kept(path, monkeypatch):
    work = WorkFolder(path, JOB, resume=False)
    work.save("first", PIECE)

    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stepquant.support.work_folder.save_file", full)
    sentence = refused(lambda: work.save("second", PIECE))
    assert sentence.startswith(f"'{path / 'second.safetensors'}' cannot be written")
    assert "continue with --resume" in sentence
    assert sorted(os.listdir(path)) == ["first.safetensors", "job.json"]


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "out.work"
    assert f"'{path}' cannot be created" in refused(lambda: WorkFolder(path, JOB, resume=False))


def test_removing_leaves_nothing(path):
    work = WorkFolder(path, JOB, resume=False)
    work.save("blocks/000", PIECE)
    work.remove()
    assert not path.exists()


def test_a_fingerprint_tells_names_shapes_dtypes_and_bits_apart():
    x = torch.arange(4.0)
    different = [
        {"a": x},
        {"b": x},
        {"a": x.view(2, 2)},
        {"a": x.double()},
        {"a": x.to(torch.bfloat16)},
        {"a": x.view(torch.int32)},
        {"a": torch.nextafter(x, x + 1)},
        {"a": x, "b": torch.tensor(1)},
        {},
    ]
    assert len({fingerprint(tensors) for tensors in different}) == len(different)


def test_a_fingerprint_is_that_of_the_numbers_not_of_their_layout():
    x = torch.arange(6.0).view(2, 3)
    assert fingerprint({"a": x, "b": x}) == fingerprint(
        {"b": x.clone(), "a": x.t().contiguous().t()}
    )


def test_tensors_are_told_apart_with_as_few_copies_as_possible():
    whole, twice = torch.arange(4.0), torch.ones(2)
    tensors = {"a": whole, "b": twice, "c": twice, "part": whole[1:], "t": torch.ones(2, 3).T}
    found = apart(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(tensor.is_contiguous() for tensor in found.values())
    pointers = {name: tensor.data_ptr() for name, tensor in found.items()}
    assert pointers["a"] == whole.data_ptr() and pointers["b"] == twice.data_ptr()
    assert len(set(pointers.values())) == len(pointers)
