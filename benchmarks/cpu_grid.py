"""The cells of `cpu_runtime.py`'s grid, by what they are measured with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cells import slug
from speed_files import Subject


@dataclass(frozen=True)
class Cell:
    """What one process measures: all engines on one batch, or one engine's footprint."""

    kind: str  # "timing" or "footprint"
    subject: Subject
    batch: int
    engines: tuple[str, ...]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its file."""
        what = f"b{self.batch}" if self.kind == "timing" else slug(self.engines[0])
        return f"{self.kind}-{self.subject.label}-{what}"

    def identity(self) -> dict[str, Any]:
        """What a record has to have been measured with."""
        return {
            "kind": self.kind,
            "model": self.subject.label,
            "seed": self.subject.seed,
            "batch": self.batch,
            "engines": list(self.engines),
            **self.settings,
        }


def is_finished(cell: Cell, folder: Path) -> bool:
    """Whether the cell's file is there; one of other settings is an error."""
    file = folder / f"{cell.name}.json"
    if not file.exists():
        return False
    record = json.loads(file.read_text())
    for key, value in cell.identity().items():
        if record.get(key) != value:
            raise SystemExit(
                f"'{file}' was measured with the {key} {record.get(key)!r}: expected {value!r}; "
                "delete it or choose another --cells folder"
            )
    return True
