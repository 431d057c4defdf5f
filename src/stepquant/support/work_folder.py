"""Finished parts of a long computation on disk, so that a killed run can resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.support.atomic import PARTIAL, atomic_write, is_partial
from stepquant.support.errors import StepQuantError

JOB = "job.json"
RESULT = "result.json"  # names the files of the finished result with their digests
DIGEST = "sha256"  # in the header of each piece
AGAIN = "delete it and continue with --resume, which computes it again"


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` in the form that safetensors requires: contiguous, each in its own storage.

    Tensors are copied only if necessary. For example, a layer that is used in several places has
    one tensor under several names.
    """
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        storage = whole.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != whole.nbytes:
            whole = whole.clone()
        seen.add(whole.untyped_storage().data_ptr())
        found[name] = whole
    return found


def is_foreign(path: Path) -> bool:
    """Whether `path` is a file, or a folder that holds more than a partial job file."""
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    return not all(is_partial(entry, JOB) for entry in path.iterdir())


class WorkFolder:
    """Named sets of tensors on disk, each complete or absent, and each with a digest.

    Only one process at a time may use the folder; `support.lock` sees to that. The folder belongs
    to one job. `job` holds everything that determines the job's result, as JSON
    values; the folder keeps it in `job.json`. With `resume`, a folder of the same job is continued;
    `resumed` says what was asked for.
    If `path` is None, nothing is kept.

    Raises:
        StepQuantError: the folder holds another job, or an unfinished job without `resume`, is not
            a work folder, or cannot be created.
    """

    def __init__(self, path: Path | None, job: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.resumed = resume
        if path is None:
            return
        text = json.dumps(job, indent=1, sort_keys=True)
        record = path / JOB
        if resume and record.exists():
            if _read(record) != text:
                raise StepQuantError(
                    f"'{path}' holds the work of another job: expected the same model, sampler, "
                    "recipe, bits, seed, threads and versions as in its job.json; repeat the "
                    "first command, or delete the folder to start again"
                )
            _remove_partial(path)
            return
        if not record.exists() and is_foreign(path):
            raise StepQuantError(
                f"'{path}' exists and is not a work folder of stepquant: expected no such folder; "
                "move it away or name another output"
            )
        if record.exists():
            raise StepQuantError(
                f"'{path}' holds an unfinished job: continue with --resume (resume=True), or "
                "delete the folder to start again"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            _remove_partial(path)
            atomic_write(record, lambda partial: partial.write_text(text))
        except OSError as error:
            raise StepQuantError(
                f"the work folder '{path}' cannot be created ({error.strerror}): expected a "
                "writable folder with free space; name another output"
            ) from error

    def _file(self, key: str) -> Path:
        assert self.path is not None
        return self.path / f"{key}.safetensors"

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Store `tensors` under `key`, replacing earlier ones.

        Raises:
            StepQuantError: the file cannot be written.
        """
        if self.path is None:
            return
        file = self._file(key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            whole = apart(tensors)
            header = {DIGEST: _digest(key, whole)}
            atomic_write(file, lambda partial: save_file(whole, partial, header))
        except (OSError, SafetensorError) as error:
            raise StepQuantError(
                f"'{file}' cannot be written ({error}): expected free space on the disk; free some "
                "and continue with --resume"
            ) from error

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors stored under `key`, or None if there are none.

        Raises:
            StepQuantError: the file is damaged, or holds another piece.
        """
        if self.path is None or not self._file(key).exists():
            return None
        path = self._file(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                stored = (file.metadata() or {}).get(DIGEST)
        except (OSError, SafetensorError) as error:
            raise StepQuantError(
                f"'{path}' cannot be read ({error}): expected a safetensors file; {AGAIN}"
            ) from error
        found = _digest(key, tensors)
        if found != stored:
            raise StepQuantError(
                f"'{path}' has the SHA-256 {found}: expected {stored}, as its header says, so it "
                f"is damaged; {AGAIN}"
            )
        return tensors

    def note_result(self, files: Mapping[str, str]) -> None:
        """Note the result before it gets its name: `files` are digests by relative path.

        Raises:
            StepQuantError: the note cannot be written.
        """
        if self.path is None:
            return
        text = json.dumps(dict(files), indent=1, sort_keys=True)
        note = self.path / RESULT
        try:
            atomic_write(note, lambda partial: partial.write_text(text))
        except OSError as error:
            raise StepQuantError(
                f"'{note}' cannot be written ({error.strerror}): expected room on the disk; free "
                "some and continue with --resume"
            ) from error

    def is_result(self, files: Mapping[str, str]) -> bool:
        """Whether `files`, digests by relative path, are those of the result that was noted."""
        note = None if self.path is None else self.path / RESULT
        if note is None or not note.is_file():
            return False
        return _read(note) == json.dumps(dict(files), indent=1, sort_keys=True)

    def remove_if_empty(self) -> None:
        """Delete the folder, unless it holds a piece."""
        if self.path is not None and not any(self.path.rglob("*.safetensors")):
            self.remove()

    def remove(self) -> None:
        """Delete the folder; call it once the result is safe."""
        if self.path is not None and self.path.exists():
            # Renamed first: a kill during deletion must not leave a folder that looks like a job.
            done = self.path.with_name(f".{self.path.name}.done")
            shutil.rmtree(done, ignore_errors=True)  # left by an earlier kill
            self.path.rename(done)
            shutil.rmtree(done, ignore_errors=True)


def _remove_partial(folder: Path) -> None:
    """Delete the temporary files that a killed process has left in a work folder."""
    for partial in folder.rglob(f"*{PARTIAL}"):
        partial.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StepQuantError(
            f"'{path}' cannot be read ({error}): expected the JSON that stepquant wrote; delete "
            f"the folder '{path.parent}' to start anew"
        ) from error


def _digest(key: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a piece, as hex digits; pieces of other keys have others."""
    return hashlib.sha256(f"{key} {fingerprint(tensors)}".encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of `tensors`, as hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
