"""Memory of this process: what it holds, what it may take, and its peak."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from stepquant.support.errors import StepQuantError

MEGABYTE = 1e6  # bytes


def held_bytes() -> int:
    """Resident memory of this process."""
    return psutil.Process().memory_info().rss


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process may take yet: free memory, in a container at most up to its limit."""
    free = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return free if limit == "max" else min(free, int(limit) - int(used["anon"]))
    except (OSError, KeyError, ValueError):
        return free


def reset_peak_memory(clear_refs: Path = Path("/proc/self/clear_refs")) -> bool:
    """Start the high-water mark that `peak_memory_mb` reads again from what is held now.

    Linux can do that for a process (writing 5 to `clear_refs`); elsewhere nothing happens and the
    answer is False, and the mark stays that of the whole process.
    """
    try:
        clear_refs.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_mb(status: Path = Path("/proc/self/status")) -> float:
    """The most resident memory this process has held, in MB of 10^6 bytes.

    It is a high-water mark of the process, since its start or the last `reset_peak_memory`: it
    does not fall when memory is freed. Where it cannot be reset, measure each model in a process
    of its own. Memory on a GPU is not in it.

    On Linux it is `VmHWM` of `/proc/self/status`, because there `getrusage` gives a freshly
    started child the high-water mark of its parent, so a fresh process would not help. Elsewhere
    it is `ru_maxrss` of `getrusage`, in bytes on macOS and in kB on other systems.

    Args:
        status: where Linux keeps the process status.

    Raises:
        StepQuantError: the system has neither, such as Windows.
    """
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / MEGABYTE  # "kB" there means 1024 bytes
    try:
        import resource  # absent on Windows
    except ModuleNotFoundError as error:
        raise StepQuantError(
            f"peak memory cannot be read on '{sys.platform}': expected Linux, macOS or another "
            "Unix; leave the memory out"
        ) from error
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MEGABYTE


def as_mb(size: int) -> float:
    """Bytes in MB of 10^6, as `peak_memory_mb` counts."""
    return round(size / MEGABYTE, 1)
