"""One process at a time: a lock on a path, which tells who holds it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:
    import fcntl
else:
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None

# Errors of file systems on which no file can be locked.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def held(path: Path | None) -> Iterator[None]:
    """Hold the lock on `path` while the block runs; None needs none.

    The lock is the hidden file `.NAME.lock` beside `path`. It holds the process and the host of its
    owner, and is deleted at the end. The operating system releases the lock of a process that dies.
    Where a file system has no locks, the file alone is the lock: whoever creates it holds it. One
    of a process that has died on this host is taken over; one of another host has to be deleted.

    Raises:
        StepQuantError: another process, or another thread, holds the lock, or the file cannot be
            written.
    """
    if path is None:
        yield
        return
    file = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(file, path)
    except OSError as error:
        raise StepQuantError(
            f"the lock '{file}' cannot be made ({error.strerror}): expected a place that can be "
            "written to, with room; name another output"
        ) from error
    try:
        yield
    finally:
        # Deleted before it is released: another process may open it at any time.
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(descriptor)


def _acquire(file: Path, path: Path) -> int:
    """Return the descriptor of `file`, which this process holds from now on."""
    while True:
        descriptor, is_new = _opened(file)
        try:
            owner = os.read(descriptor, 1000).decode(errors="replace")
            locked = _locked(descriptor)
            if locked is None and not is_new:
                locked = _taken_over(file, owner)
            if locked is False:
                raise _in_use(path, file, owner)
            # Whoever held the lock until now has deleted the file that it was on.
            if not _is_at(descriptor, file):
                os.close(descriptor)
                continue
            _write_owner(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _opened(file: Path) -> tuple[int, bool]:
    """Open or create `file`; return the descriptor, and whether this call has created it."""
    # Never through a link, which would write to the link's target.
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            return os.open(file, flags), False


def _write_owner(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == file.stat().st_ino
    except FileNotFoundError:
        return False


def _locked(descriptor: int) -> bool | None:
    """Lock the open file; False if somebody else has locked it, None if it cannot be locked."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            if error.errno not in NO_LOCKS:
                raise
    return None


def _taken_over(file: Path, owner: str) -> bool:
    """Take over the lock `file`, which is no more than a file, of an `owner` that has died.

    Only the process that creates a second file may write to the lock of a dead owner, so that of
    several that find it one takes it over.
    """
    if not _has_died(owner):
        return False
    second = _second(file)
    try:
        os.close(os.open(second, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    try:
        # Another process may have taken it over and ended since the owner was read.
        now = os.open(file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if os.read(now, 1000).decode(errors="replace") != owner:
                return False
            _write_owner(now)
        finally:
            os.close(now)
        return True
    except FileNotFoundError:
        return False
    finally:
        second.unlink()


def _second(file: Path) -> Path:
    return file.with_name(f"{file.name}.takeover")


def _has_died(owner: str) -> bool:
    """Whether the process that wrote `owner` ran on this host and has ended."""
    pid, _, host = owner.partition(" ")
    return host.strip() == socket.gethostname() and not is_alive(pid)


def is_alive(pid: Any) -> bool:
    """Whether a process of that number runs on this host; True if that cannot be known."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, OverflowError):
        pass
    return True


def _in_use(path: Path, file: Path, owner: str) -> StepQuantError:
    pid, _, host = owner.strip().partition(" ")
    who = f"process {pid} on host '{host}'" if pid and host else "another process"
    return StepQuantError(
        f"'{path}' is in use by {who}: expected one process at a time; wait until it ends, or name "
        f"another output (its lock is '{file}')"
    )
