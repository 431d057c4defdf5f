"""Files and folders on disk that are complete or as they were before, whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from stepquant.support.errors import StepQuantError

PARTIAL = ".partial"  # ends the temporary name of a file, and stands in that of a folder


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Replace the file `path` by what `write(temporary path)` writes, once that is on the disk.

    A symbolic link stays one: its target is replaced. A device or a pipe is written to directly.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        write(path)
        return
    if path.is_symlink():
        path = path.resolve()
    partial = path.with_name(path.name + PARTIAL)
    try:
        write(partial)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to write to, which becomes the new `folder` at the end, or vanishes.

    Files and folders get the user's usual modes. Raises StepQuantError if `folder` exists, and
    when the disk is full or refuses the write.
    """
    check_new_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}{PARTIAL}-"
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            yield partial
            _finish(partial, folder)
        except BaseException:  # also an interrupt: nothing half-written stays behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise _write_error(folder, error) from error


def check_new_folder(folder: str | Path) -> Path:
    """`folder` if nothing is there yet; ask before the work whose result goes there."""
    folder = Path(folder)
    if folder.exists():
        raise StepQuantError(
            f"output folder '{folder}' exists: expected a new one; name another or delete it"
        )
    return folder


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left of an unfinished `folder`."""
    for partial in folder.parent.glob(f".{folder.name}{PARTIAL}-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _finish(partial: Path, folder: Path) -> None:
    mask = _umask()  # mkdtemp and safetensors make theirs private
    for path in (partial, *partial.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _flush(path)
    partial.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    """Wait until the file, or the names in the folder, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows does not open folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    return mask


def _write_error(folder: Path, error: Exception) -> StepQuantError:
    # safetensors reports the operating system's errors as text only.
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error):
        return StepQuantError(
            f"no space left on the disk while writing '{folder}': nothing was kept; free some "
            "space or choose a folder on another disk"
        )
    if number in (errno.ENOTEMPTY, errno.EEXIST) and folder.exists():
        return StepQuantError(
            f"the output folder '{folder}' appeared while it was being written: expected a new "
            "one; choose another name"
        )
    reason = getattr(error, "strerror", None) or str(error)
    return StepQuantError(
        f"'{folder}' could not be written ({reason}): nothing was kept; choose a folder that can "
        "be written to"
    )
