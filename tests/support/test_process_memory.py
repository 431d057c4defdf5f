from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stepquant.support.errors import StepQuantError
from stepquant.support.process_memory import available_bytes, peak_memory_mb, reset_peak_memory


def test_a_container_has_no_more_than_its_limit(tmp_path):
    free = available_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\nfile 500000\n")
    assert available_bytes(tmp_path) == 600_000 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 600_000


def test_peak_memory_is_read_from_the_status(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t  999999 kB\nVmHWM:\t    2000 kB\n")
    assert peak_memory_mb(status) == pytest.approx(2.048)


@pytest.mark.parametrize(("platform", "megabytes"), [("linux", 5.12), ("darwin", 0.005)])
def test_peak_memory_from_getrusage_knows_the_unit(tmp_path, monkeypatch, platform, megabytes):
    resource = pytest.importorskip("resource")

    class Usage:
        ru_maxrss = 5000

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: Usage())
    assert peak_memory_mb(tmp_path / "absent") == pytest.approx(megabytes)


def test_peak_memory_without_either_source(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(StepQuantError, match="peak memory cannot be read on"):
        peak_memory_mb(tmp_path / "absent")


def test_peak_memory_lies_between_what_is_held_now_and_what_getrusage_saw():
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("needs Linux")
    held = int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    # The kernel's counters are only exact to some pages per core.
    assert 0.98 * held <= peak_memory_mb() <= 1.02 * highest


def test_the_peak_is_that_since_the_reset() -> None:
    ballast = bytearray(64_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    before = peak_memory_mb()
    del ballast
    if not reset_peak_memory():
        pytest.skip("this system cannot reset the high-water mark")
    assert peak_memory_mb() < before - 32


def test_a_system_without_clear_refs_says_so(tmp_path: Path) -> None:
    assert reset_peak_memory(tmp_path / "absent" / "clear_refs") is False
