"""Atomic writes of files and folders: after a failure the disk is as it was before."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from stepquant.support.errors import StepQuantError
from stepquant.support.lock import is_alive

PARTIAL = ".partial"  # ends the temporary name of a file; part of that of a folder
LONGEST = 100  # characters of a name that its temporary name repeats: a name has 255 bytes at most


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Replace the file `path` with the output of `write(temporary path)`, once it is on the disk.

    The temporary file is new, hidden and beside `path`. If `path` is a symbolic link, its target is
    replaced. A device or a pipe is written to directly. Errors of `write` and of the operating
    system are passed on, and the temporary file is deleted.
    """
    path = user_path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        write(path)
        return
    if path.is_symlink():
        path = path.resolve()
    # Exclusive, with a random name: a file or a link that is there already is never written to.
    descriptor, name = tempfile.mkstemp(PARTIAL, _hidden(path.name), path.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o666 & ~_umask())  # mkstemp and safetensors create private files
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(path: Path, name: str) -> bool:
    """Whether `path` is a temporary file that a killed `atomic_write` of `name` may have left."""
    mine = path.name.startswith(_hidden(name)) and path.name.endswith(PARTIAL)
    return mine or path.name == name + PARTIAL  # as older releases called it


@contextmanager
def atomic_folder(folder: Path, modes: Mapping[str, int] | None = None) -> Iterator[Path]:
    """Yield a hidden folder to write to; it becomes the new `folder` at the end.

    After an error or an interrupt, the hidden folder is deleted. Files and folders get the modes of
    the user's umask. `modes` may narrow them: it holds modes by relative path, and is read at the
    end.

    Raises:
        StepQuantError: `folder` exists, or the disk is full or refuses the write.
    """
    folder = check_new_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{_prefix(folder)}{_owner()}-"
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            yield partial
            _finish(partial, folder, modes or {})
        except BaseException:  # includes interrupts: no partial folder stays behind
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise _write_error(folder, error) from error


def check_new_folder(folder: str | Path) -> Path:
    """Return `folder`, with `~` filled in, if nothing of that name is there.

    Call it before the work that fills the folder.

    Raises:
        StepQuantError: `folder` exists, also as a link that leads nowhere.
    """
    folder = user_path(folder)
    if os.path.lexists(folder):
        raise StepQuantError(
            f"output folder '{folder}' exists: expected a new one; name another or delete it"
        )
    return folder


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` with the user's home folder in the place of `~`.

    Raises:
        StepQuantError: the home folder of that user is not known, or the system cannot look at such
            a path: its folder may not be entered, or a name is too long.
    """
    try:
        found = Path(path).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.lstat()
        return found
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StepQuantError(
            f"the path '{path}' cannot be looked at ({reason}): expected one that the system "
            "takes; check it and its permissions"
        ) from error
    except RuntimeError as error:
        raise StepQuantError(
            f"'{path}' begins with the home folder of a user who is not known here: expected a "
            "path; write it in full, or as './~name'"
        ) from error


def remove_partial(folder: Path) -> None:
    """Delete the hidden folders that killed processes left while writing `folder`.

    Those of running processes, and of processes on other hosts, stay.
    """
    if not folder.parent.is_dir():
        return
    for partial in folder.parent.iterdir():
        name = partial.name
        if not name.startswith(_prefix(folder)) or partial.is_symlink():
            continue
        pid, _, rest = name.removeprefix(_prefix(folder)).partition("@")
        if rest and (is_alive(pid) or not rest.startswith(f"{_host()}-")):
            continue
        shutil.rmtree(partial, ignore_errors=True)


def _hidden(name: str) -> str:
    return f".{name[:LONGEST]}."


def _prefix(folder: Path) -> str:
    return f".{folder.name[:LONGEST]}{PARTIAL}-"


def _owner() -> str:
    """Return what the name of a hidden folder says about its writer."""
    return f"{os.getpid()}@{_host()}"


def _host() -> str:
    return socket.gethostname().replace(os.sep, "_")[:64]


def _finish(partial: Path, folder: Path, modes: Mapping[str, int]) -> None:
    mask = _umask()  # mkdtemp and safetensors create private folders and files
    for path in (partial, *partial.rglob("*")):
        usual = 0o777 if path.is_dir() else 0o666
        owners = 0o700 if path.is_dir() else 0o600
        narrowed = modes.get(path.relative_to(partial).as_posix(), usual) | owners
        path.chmod(usual & ~mask & narrowed)
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
    if is_full_disk(error):
        return StepQuantError(
            f"no space left on the disk while writing '{folder}': no part of that folder was kept; "
            "free some space or choose a folder on another disk"
        )
    number = getattr(error, "errno", None)
    if number in (errno.ENOTEMPTY, errno.EEXIST) and folder.exists():
        return StepQuantError(
            f"the output folder '{folder}' appeared while it was being written: expected a new "
            "one; choose another name"
        )
    reason = getattr(error, "strerror", None) or str(error)
    other = getattr(error, "filename", None)
    own = other is None or PARTIAL in str(other) or Path(str(other)) in (folder, *folder.parents)
    if not own:
        return StepQuantError(
            f"'{other}' could not be read or written ({reason}) while '{folder}' was written, of "
            "which no part was kept: check that path and its permissions"
        )
    return StepQuantError(
        f"'{folder}' could not be written ({reason}): no part of that folder was kept; choose a "
        "folder that can be written to"
    )


def is_full_disk(error: BaseException) -> bool:
    """Whether `error` says that the disk, or the user's share of it, is full."""
    # safetensors reports errors of the operating system only as text.
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error)
