from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys

import pytest

from stepquant.support.atomic import (
    atomic_folder,
    atomic_write,
    check_new_folder,
    remove_partial,
    user_path,
)
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
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    dead = f".out.partial-{int(process.stdout)}@{socket.gethostname()}-abc"
    for name in (".out.partial-abc", dead, ".other.partial-abc"):
        (tmp_path / name).mkdir()
    remove_partial(tmp_path / "out")
    assert os.listdir(tmp_path) == [".other.partial-abc"]


def test_what_running_processes_and_other_hosts_write_is_left_alone(tmp_path):
    elsewhere = ".out.partial-1@elsewhere-abc"
    (tmp_path / elsewhere).mkdir()
    with atomic_folder(tmp_path / "out") as partial:
        remove_partial(tmp_path / "out")
        assert partial.is_dir()
    assert sorted(os.listdir(tmp_path)) == [elsewhere, "out"]


@pytest.mark.parametrize("name", ["X*", "[ab]", "?", "*"])
def test_a_name_with_wildcards_stands_for_itself_only(tmp_path, name):
    for other in (".X1.partial-abc", ".a.partial-abc", ".Xout.partial-abc"):
        (tmp_path / other).mkdir()
    remove_partial(tmp_path / name)
    with atomic_folder(tmp_path / name) as partial:
        (partial / "file").write_text("text")
    assert len(os.listdir(tmp_path)) == 4


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("dear")
    (tmp_path / ".out.partial-abc").symlink_to(tmp_path / "mine")
    remove_partial(tmp_path / "out")
    assert (tmp_path / "mine" / "file").read_text() == "dear"


@pytest.mark.parametrize("planted", ["file.partial", ".file.partial"])
def test_files_and_links_with_temporary_names_are_left_alone(tmp_path, planted):
    (tmp_path / "mine").write_text("dear")
    (tmp_path / planted).symlink_to(tmp_path / "mine")
    atomic_write(tmp_path / "file", lambda partial: partial.write_text("new"))
    assert (tmp_path / "mine").read_text() == "dear"
    assert (tmp_path / planted).is_symlink() and (tmp_path / "file").read_text() == "new"


def test_a_file_gets_the_usual_mode(tmp_path):
    atomic_write(tmp_path / "file", lambda partial: partial.write_text("new"))
    (tmp_path / "usual").write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "usual")]
    assert modes[0] == modes[1]


def test_modes_may_be_narrowed(tmp_path):
    modes: dict[str, int] = {}
    with atomic_folder(tmp_path / "out", modes) as partial:
        for name in ("secret", "open"):
            (partial / name).write_text("")
        modes |= {"secret": 0o600, "open": 0o777}
    found = {p.name: stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (tmp_path / "out").iterdir()}
    assert found["secret"] == 0 and found["open"] == 0o077 & 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_longest_names_are_written(tmp_path):
    name = "n" * 250
    atomic_write(tmp_path / name, lambda partial: partial.write_text("new"))
    with atomic_folder(tmp_path / ("m" * 250)):
        pass
    assert {len(entry) for entry in os.listdir(tmp_path)} == {250}


def test_a_file_that_cannot_be_read_is_named_not_the_folder(tmp_path):
    with (
        pytest.raises(StepQuantError, match=r"absent' could not be read or written \(No such"),
        atomic_folder(tmp_path / "out"),
    ):
        (tmp_path / "absent").read_text()


def test_a_link_that_leads_nowhere_is_no_new_folder(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StepQuantError, match="exists: expected a new one"):
        check_new_folder(tmp_path / "out")


def test_the_home_folder_is_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_new_folder("~/out") == tmp_path / "out"
    with pytest.raises(StepQuantError, match=r"'~no-such-user/out' begins with the home folder"):
        user_path("~no-such-user/out")


@pytest.mark.parametrize("name", ["n" * 300, "a\0b"], ids=["long", "null"])
def test_a_path_that_the_system_does_not_take_is_named(tmp_path, name):
    for act in (user_path, check_new_folder):
        with pytest.raises(StepQuantError, match=r"the path '.*' cannot be looked at \("):
            act(tmp_path / name)
