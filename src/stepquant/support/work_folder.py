"""Finished parts of a long computation on disk, so that a killed run can resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant.support.atomic import PARTIAL, atomic_write
from stepquant.support.errors import StepQuantError

JOB = "job.json"


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
        return path.exists()
    return any(entry.name != JOB + PARTIAL for entry in path.iterdir())


class WorkFolder:
    """Named sets of tensors on disk, each complete or absent.

    The folder belongs to one job. `job` holds everything that determines the job's result, as JSON
    values; the folder keeps it in `job.json`. With `resume`, a folder of the same job is continued.
    If `path` is None, nothing is kept.

    Raises:
        StepQuantError: the folder holds another job, or an unfinished job without `resume`, is not
            a work folder, or cannot be created.
    """

    def __init__(self, path: Path | None, job: dict[str, Any], resume: bool) -> None:
        self.path = path
        if path is None:
            return
        text = json.dumps(job, indent=1, sort_keys=True)
        record = path / JOB
        if resume and record.exists():
            if record.read_text() != text:
                raise StepQuantError(
                    f"'{path}' holds the work of another job: expected the same model, sampler, "
                    "recipe, bits, seed, threads and versions as in its job.json; repeat the "
                    "first command, or delete the folder to start again"
                )
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
            atomic_write(file, lambda partial: save_file(apart(tensors), partial))
        except (OSError, SafetensorError) as error:
            raise StepQuantError(
                f"'{file}' cannot be written ({error}): expected free space on the disk; free some "
                "and continue with --resume"
            ) from error

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors stored under `key`, or None if there are none.

        Raises:
            StepQuantError: the file is damaged.
        """
        if self.path is None or not self._file(key).exists():
            return None
        try:
            return load_file(self._file(key))
        except SafetensorError as error:
            raise StepQuantError(
                f"'{self._file(key)}' cannot be read ({error}): expected a safetensors file; "
                "delete it and continue with --resume, which computes it again"
            ) from error

    def remove(self) -> None:
        """Delete the folder; call it once the result is safe."""
        if self.path is not None and self.path.exists():
            # Renamed first: a kill during deletion must not leave a folder that looks like a job.
            done = self.path.with_name(f".{self.path.name}.done")
            shutil.rmtree(done, ignore_errors=True)  # left by an earlier kill
            self.path.rename(done)
            shutil.rmtree(done, ignore_errors=True)


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of `tensors`, as hex digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
