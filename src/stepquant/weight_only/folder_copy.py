"""Copying of a model folder's other files, and of nothing that lies outside the folder."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from stepquant.checkpoint.file_sums import SUMS_NAME
from stepquant.models.weight_files import shard_names, without_variant
from stepquant.support.errors import StepQuantError


def check_contained(folder: Path) -> list[Path]:
    """Return the files below `folder`, after a check that each lies in it.

    Links may lead to other places in `folder`, and into the cache of the hub, whose folders consist
    of links.

    Raises:
        StepQuantError: a link leads elsewhere or nowhere, or a file is none, such as a device.
    """
    return sorted(_files(folder, _roots(folder)))


def copy_files(folder: Path, files: list[Path], target: Path) -> dict[str, int]:
    """Copy `files` of `folder` to the same places below `target`; return their modes.

    Weights that a component has in one variant only, such as "fp16", lose the variant in their
    names, because the quantized weights beside them have none and diffusers looks for one variant.
    The modes are by path below `target`, so that a copy need not be readable by more people.
    """
    modes = {}
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name == SUMS_NAME:
            continue
        plain = without_variant(path)
        name = (path.relative_to(folder).parent / plain).as_posix()
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if plain != path.name and path.suffix == ".json":
            text = path.read_text(encoding="utf-8")
            for shard in shard_names(path):
                text = text.replace(json.dumps(shard), json.dumps(without_variant(path, shard)))
            (target / name).write_text(text, encoding="utf-8")
        else:
            shutil.copyfile(path, target / name)
        modes[name] = stat.S_IMODE(path.stat().st_mode)
    return modes


def _roots(folder: Path) -> list[Path]:
    """Return the folders in which the files of `folder` may really lie."""
    roots = [folder.resolve(), Path(HF_HUB_CACHE).resolve()]
    if folder.parent.name == "snapshots":  # a cache in another place
        roots.append((folder.parent.parent / "blobs").resolve())
    return roots


def _files(folder: Path, roots: list[Path]) -> Iterator[Path]:
    for path in folder.iterdir():
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise StepQuantError(
                f"'{path}' is a link that leads nowhere or in a circle: expected a file or a "
                "folder; delete it or fetch the folder again"
            ) from error
        if not any(real.is_relative_to(root) for root in roots):
            raise StepQuantError(
                f"'{path}' is a link to '{real}', outside the model's folder: expected links "
                "within the folder or into the cache of the hub; put a copy in the place of the "
                "link"
            )
        if real.is_dir():
            if folder.resolve().is_relative_to(real):
                raise StepQuantError(
                    f"'{path}' is a link to a folder that it lies in: expected files and folders; "
                    "delete the link"
                )
            yield from _files(path, roots)
        elif real.is_file():
            yield path
        else:
            raise StepQuantError(
                f"'{path}' is neither a file nor a folder: expected only those in a model's "
                "folder; move it away"
            )
