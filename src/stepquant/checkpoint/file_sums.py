"""Digests of a folder's files, which `load` compares with the files.

The checksum of a quantized component covers its tensors and its config, wherever they are loaded
from. Scheduler, tokenizers and the components that stayed float have none, so the folder that
`quantize` writes holds their digests in a file of its own. Folders without one load as they are:
those of older releases, and those that `save_pretrained` wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from stepquant.checkpoint.checksum import CHECKSUM_NAME
from stepquant.checkpoint.folder import INDEX_NAME
from stepquant.support.errors import StepQuantError
from stepquant.support.json_text import read_json

SUMS_NAME = "stepquant_sha256.json"


def file_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below `folder`, as hex digits, by relative path."""
    return {name: _digest(folder / name) for name in _names(folder)}


def write_sums(folder: Path) -> None:
    """Write the digests of what a load of `folder` reads to `stepquant_sha256.json` in it.

    That is `model_index.json` and the folders of components. The files of components with a
    checksum of their own are left out, and so are a model card and hidden files, which people edit.
    """
    (folder / SUMS_NAME).unlink(missing_ok=True)
    covered = {part.name for part in folder.iterdir() if part.is_dir() and _has_checksum(part)}
    sums = {
        name: _digest(folder / name)
        for name in _names(folder)
        if name.partition("/")[0] not in covered and _is_read(name)
    }
    if not sums:
        return
    text = json.dumps(sums, indent=2, sort_keys=True) + "\n"
    (folder / SUMS_NAME).write_text(text, encoding="utf-8")


def check_sums(folder: Path) -> None:
    """Check the files of `folder` against its `stepquant_sha256.json`, if there is one.

    Raises:
        StepQuantError: a file is missing or differs, or the digests cannot be read.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return
    remedy = _remedy(path)
    for name, wanted in read_sums(path).items():
        if not (folder / name).is_file():
            raise StepQuantError(f"'{folder}' has no file '{name}', which '{path}' names: {remedy}")
        found = _digest(folder / name)
        if found != wanted:
            raise StepQuantError(
                f"'{folder / name}' has the SHA-256 {found}: expected {wanted}, as '{path}' says; "
                f"one of the two is damaged or was changed, so {remedy}"
            )


def read_sums(path: Path) -> dict[str, str]:
    """Return the digests in the file `path` by file name.

    Raises:
        StepQuantError: the digests cannot be read.
    """
    sums = read_json(path, "the digests of a folder")
    if not isinstance(sums, dict) or not all(isinstance(each, str) for each in sums.values()):
        raise StepQuantError(f"'{path}' holds no digests by file name: {_remedy(path)}")
    return sums


def _remedy(path: Path) -> str:
    return (
        f"fetch or write the folder again, or delete '{path}' if you have changed the folder "
        "yourself"
    )


def _has_checksum(part: Path) -> bool:
    """Whether the component in the folder `part` has a checksum among its tensors."""
    for path in part.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if CHECKSUM_NAME in file.keys():  # noqa: SIM118
                return True
    return False


def _is_read(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and ("/" in name or name == INDEX_NAME)


def _names(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise StepQuantError(
            f"'{path}' cannot be read ({error.strerror}): expected a file of a model folder; check "
            "its permissions"
        ) from error
    return found.hexdigest()
