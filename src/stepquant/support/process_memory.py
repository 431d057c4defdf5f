"""Memory of this process: held, available and peak."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from stepquant.support.errors import StepQuantError

MEGABYTE = 1e6  # bytes


def held_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return psutil.Process().memory_info().rss


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory that this process may still allocate, in bytes.

    This is the system's available memory, and in a container at most the rest of its limit.
    `cgroup` is the folder with the limits of the container (cgroup v2).
    """
    free = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return free if limit == "max" else min(free, int(limit) - int(used["anon"]))
    except (OSError, KeyError, ValueError):
        return free


def reset_peak_memory(clear_refs: Path = Path("/proc/self/clear_refs")) -> bool:
    """Reset the high-water mark of `peak_memory_mb` to the memory held now.

    Returns whether the reset worked. Linux resets the mark when a process writes 5 to `clear_refs`.
    On other systems the function does nothing and returns False.
    """
    try:
        clear_refs.write_text("5")
    except OSError:
        return False
    return True


def peak_memory_mb(status: Path = Path("/proc/self/status")) -> float:
    """Return the peak resident memory of this process, in MB of 10^6 bytes.

    The value is a high-water mark since the start of the process or the last `reset_peak_memory`.
    It does not fall when memory is freed. Where it cannot be reset, measure each model in a process
    of its own. GPU memory is not included.

    On Linux the value is `VmHWM` of `/proc/self/status`: there `getrusage` gives a new child
    process the high-water mark of its parent, so a fresh process would not help. Elsewhere it is
    `ru_maxrss` of `getrusage`, in bytes on macOS and in kB of 1024 bytes on other systems.

    Args:
        status: where Linux keeps the process status.

    Raises:
        StepQuantError: the system has neither source, such as Windows.
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
    """Return `size` bytes in MB of 10^6 bytes, rounded to one decimal."""
    return round(size / MEGABYTE, 1)
