"""The committed table of outcomes, `benchmarks/results/diffusers_behaviours.json`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "diffusers_behaviours.json"


def cells(entry: dict[str, list[str]]) -> dict[str, str]:
    """`{model: outcome}` of an entry of the file, which lists the models of each outcome."""
    return {model: text for text, models in entry.items() for model in models}


def compact(found: dict[str, str]) -> dict[str, list[str]]:
    """The entry of `found`, in an order of its own, so that equal runs write equal files."""
    entry: dict[str, list[str]] = {}
    for model, text in sorted(found.items()):
        entry.setdefault(text, []).append(model)
    return entry


@cache
def table() -> dict[str, Any]:
    """The file's values."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def expected(name: str, kind: str, model: str) -> str:
    """The committed outcome of a cell.

    Raises:
        KeyError: the file lacks the cell; `python benchmarks/diffusers_behaviours.py --new`.
    """
    return cells(table()["outcomes"][name][kind])[model]
