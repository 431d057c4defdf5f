"""Writes what a benchmark found, for scripts whose result is one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepquant.support.atomic import atomic_write


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write `record` as JSON to `path`, whose folder is made; all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    atomic_write(path, lambda partial: partial.write_text(text))
