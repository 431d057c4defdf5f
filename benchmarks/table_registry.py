"""The tables of the documentation by name, and what each of them is made with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# A number and its unit stay on one line.
UNIT = re.compile(r"(?<=\d) (?=(?:dB|ms|s|MB|GiB|B|%)\b|%)")
NARROW = "\N{NO-BREAK SPACE}"

Record = dict[str, Any]
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Register a table under its function's name, with dashes."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function


def read(name: str) -> Any:
    """One file of results; a list of records for `.jsonl`."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("| " + " | ".join(["---", *["--:"] * (len(head) - 1)]) + " |")
    lines += ["| " + " | ".join(UNIT.sub(NARROW, cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"
