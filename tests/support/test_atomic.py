from __future__ import annotations

import os
import stat

import pytest

from stepquant.support.atomic import atomic_folder, atomic_write, check_new_folder, remove_partial
from stepquant.support.errors import StepQuantError


def test_a_write_takes_the_place_of_the_file_at_once(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write(partial):
        partial.write_text("new")
        assert target.read_text() == "old"

    atomic_write(target, write)
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")

    def write(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(error):
        atomic_write(target, write)
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_a_link_and_its_target_is_replaced(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    atomic_write(tmp_path / "link", lambda partial: partial.write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(pipe, lambda path: path.write_text("text"))
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_the_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    atomic_write(tmp_path / "file", lambda partial: partial.write_text("new"))
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


def test_a_folder_is_there_only_when_all_of_it_is(tmp_path):
    out = tmp_path / "a" / "out"
    with atomic_folder(out) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("text")
        assert partial.parent == out.parent and not out.exists()
    assert (out / "inner" / "file").read_text() == "text"
    assert os.listdir(out.parent) == ["out"]


def test_a_folder_gets_the_usual_modes(tmp_path):
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("text")
    (tmp_path / "usual").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "usual")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(5, "no")])
def test_a_folder_that_fails_vanishes(tmp_path, error):
    raised = StepQuantError if isinstance(error, OSError) else type(error)
    with pytest.raises(raised), atomic_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("half")
        raise error
    assert os.listdir(tmp_path) == []


def test_a_folder_that_exists_is_refused(tmp_path):
    for act in (check_new_folder, lambda folder: atomic_folder(folder).__enter__()):
        with pytest.raises(StepQuantError, match="exists: expected a new one"):
            act(tmp_path)


def test_what_a_kill_left_of_a_folder_is_removed(tmp_path):
    (tmp_path / ".out.partial-abc").mkdir()
    (tmp_path / ".other.partial-abc").mkdir()
    remove_partial(tmp_path / "out")
    assert os.listdir(tmp_path) == [".other.partial-abc"]
