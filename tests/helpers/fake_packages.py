"""Installed packages with entry points, as folders on the path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path, name: str, entries: Mapping[str, str], group: str, module: str | None = None
) -> Path:
    """Put the package `name` 1.0 into `folder`, which has to be on the path.

    `entries`: of the entry-point `group`, by name. `module`: the text of its one module, which is
    called as the package is.
    """
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    if module is not None:
        (folder / f"{name}.py").write_text(module)
    return folder
