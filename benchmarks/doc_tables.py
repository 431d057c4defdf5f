"""Fills the tables of the documentation in from `benchmarks/results`.

    python benchmarks/doc_tables.py            # rewrite the pages
    python benchmarks/doc_tables.py --check    # list the pages that are out of date

A page says where a table goes: this script replaces whatever stands between
`<!-- table: NAME -->` and `<!-- end of table -->` by the table `NAME`. The functions that make the
tables stand in `quality_tables.py`, `ablation_tables.py`, `study_tables.py` and `speed_tables.py`.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import ablation_tables  # noqa: F401  # importing registers a module's tables
import behaviour_tables  # noqa: F401
import quality_tables  # noqa: F401
import speed_tables  # noqa: F401
import study_tables  # noqa: F401
from table_registry import ROOT, TABLES

MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def filled(text: str, page: str) -> str:
    """`text` with every table that it marks made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"{page}: no table '{name}'; expected one of {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name]()}\n{match[4]}"

    return MARK.sub(replace, text)


def pages() -> list[Path]:
    """Every page that may have a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def outdated() -> dict[Path, str]:
    """Page -> its new text, for the pages that are not up to date."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    new = {page: filled(text, page.name) for page, text in texts.items()}
    return {page: new[page] for page in texts if new[page] != texts[page]}


def main() -> None:
    """Rewrite the pages, or list those that are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    check = parser.parse_args().check
    found = outdated()
    for page, text in found.items():
        print(page.relative_to(ROOT))
        if not check:
            page.write_text(text, encoding="utf-8")
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
