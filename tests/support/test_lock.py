from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading

import pytest

from stepquant.support import lock
from stepquant.support.errors import StepQuantError
from stepquant.support.lock import held

TAKE = """
import errno, sys, time
from pathlib import Path
from stepquant.support import lock
from stepquant.support.errors import StepQuantError

def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")

lock.fcntl.flock = flock
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock.held(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except StepQuantError:
    print("refused", flush=True)
"""
HOLD = """
import sys
from pathlib import Path
from stepquant.support.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.work"


@pytest.fixture
def other(path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def refused(path) -> str:
    with pytest.raises(StepQuantError) as error, held(path):
        pass
    return str(error.value)


def test_a_lock_leaves_nothing_behind(path):
    for _ in range(2):
        with held(path):
            assert os.listdir(path.parent) == [".out.work.lock"]
        assert os.listdir(path.parent) == []
    with pytest.raises(KeyboardInterrupt), held(path):
        raise KeyboardInterrupt
    assert os.listdir(path.parent) == []


def test_no_path_needs_no_lock():
    with held(None):
        pass


def test_the_owner_is_named(path, other):
    sentence = refused(path)
    assert f"in use by process {other.pid} on host '{socket.gethostname()}'" in sentence
    other.communicate("\n")
    with held(path):
        pass


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without locks"])
def test_the_lock_of_a_process_that_died_is_taken_over(path, other, locks, monkeypatch):
    if not locks:
        without_locks(monkeypatch)
        assert "in use by process" in refused(path)
    other.kill()
    other.wait()
    assert os.listdir(path.parent) == [".out.work.lock"]
    with held(path):
        pass


def without_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


def test_without_locks_a_process_of_another_host_keeps_it(path, monkeypatch):
    without_locks(monkeypatch)
    (path.parent / ".out.work.lock").write_text("1 elsewhere\n")
    assert "in use by process 1 on host 'elsewhere'" in refused(path)


def test_two_threads_do_not_hold_it_at_once(path):
    sentences = []
    with held(path):
        thread = threading.Thread(target=lambda: sentences.append(refused(path)))
        thread.start()
        thread.join()
    assert f"in use by process {os.getpid()}" in sentences[0]


def test_a_planted_link_is_not_written_to(path):
    (path.parent / "mine").write_text("dear")
    (path.parent / ".out.work.lock").symlink_to(path.parent / "mine")
    assert "cannot be made" in refused(path)
    assert (path.parent / "mine").read_text() == "dear"


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused(tmp_path / "file" / "out.work")


@pytest.mark.parametrize("left", [None, "dead"], ids=["new", "of a process that died"])
def test_without_locks_one_of_many_processes_holds_it(path, left):
    """All start at once, with and without a lock that may be taken over."""
    for _ in range(3):
        if left:
            ended = subprocess.Popen([sys.executable, "-c", ""])
            ended.wait()
            file = path.parent / ".out.work.lock"
            file.write_text(f"{ended.pid} {socket.gethostname()}\n")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        takers = [subprocess.Popen([sys.executable, "-c", TAKE, path], **pipes) for _ in range(4)]
        assert [taker.stdout.readline() for taker in takers] == ["ready\n"] * 4
        for taker in takers:
            taker.stdin.write("\n")
            taker.stdin.flush()
        found = [taker.stdout.readline() for taker in takers]
        for taker in takers:
            taker.communicate("\n")
        assert sorted(found) == ["held\n", *["refused\n"] * 3]
        assert os.listdir(path.parent) == []


def test_without_locks_a_file_that_was_just_made_is_held(path, monkeypatch):
    """Its owner has not yet written who it is."""
    without_locks(monkeypatch)
    (path.parent / ".out.work.lock").write_text("")
    assert "in use by another process" in refused(path)
    with held(path.with_name("other.work")):
        assert "in use by process" in refused(path.with_name("other.work"))


def test_without_locks_a_takeover_that_another_has_begun_is_left_to_it(path, other, monkeypatch):
    without_locks(monkeypatch)
    other.kill()
    other.wait()
    second = path.parent / ".out.work.lock.takeover"
    second.write_text("")
    assert "in use by process" in refused(path)
    second.unlink()
    with held(path):
        pass
    assert os.listdir(path.parent) == []
