"""Atomic writes of files and folders: after a failure the disk is as it was before."""

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

PARTIAL = ".partial"  # ends the temporary name of a file; part of that of a folder


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Replace the file `path` with the output of `write(temporary path)`, once it is on the disk.

    If `path` is a symbolic link, its target is replaced. A device or a pipe is written to directly.
    Errors of `write` and of the operating system are passed on, and the temporary file is deleted.
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
    """Yield a hidden folder to write to; it becomes the new `folder` at the end.

    After an error or an interrupt, the hidden folder is deleted. Files and folders get the modes of
    the user's umask.

    Raises:
        StepQuantError: `folder` exists, or the disk is full or refuses the write.
    """
    check_new_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{folder.name}{PARTIAL}-"
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            yield partial
            _finish(partial, folder)
        except BaseException:  # includes interrupts: no partial folder stays behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise _write_error(folder, error) from error


def check_new_folder(folder: str | Path) -> Path:
    """Return `folder` if it does not exist yet; call it before the work that fills the folder.

    Raises:
        StepQuantError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise StepQuantError(
            f"output folder '{folder}' exists: expected a new one; name another or delete it"
        )
    return folder


def remove_partial(folder: Path) -> None:
    """Delete the hidden folders that killed processes left while writing `folder`."""
    for partial in folder.parent.glob(f".{folder.name}{PARTIAL}-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _finish(partial: Path, folder: Path) -> None:
    mask = _umask()  # mkdtemp and safetensors create private folders and files
    for path in (partial, *partial.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _flush(path)
    partial.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)  # the mask can only be read by setting it
    os.umask(mask)
    return mask


def _write_error(folder: Path, error: Exception) -> StepQuantError:
    # safetensors reports errors of the operating system only as text.
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
