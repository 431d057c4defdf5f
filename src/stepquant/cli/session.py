"""Shared by all verbs: output, the JSON record, and errors in one sentence."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from stepquant.support.atomic import atomic_write
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.support.version import __version__

NOT_DONE = 2  # exit code after bad input, a full disk or Ctrl-C
PIPED_WIDTH = 160  # columns of a table if the output is not a terminal
PACKAGES = ("torch", "diffusers", "numpy", "safetensors")
FULL_DISK = "no space left on the disk: free some, or write to another disk"


class Talk:
    """The output of one run of a verb: tables and lines on stdout, progress on stderr.

    A verb puts its `results` here, for the JSON record.
    """

    def __init__(self, quiet: bool) -> None:
        self.reporter = Reporter(quiet=quiet)
        self.results: dict[str, Any] = {}
        piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        self._console = Console(
            quiet=quiet, highlight=False, emoji=False, width=PIPED_WIDTH if piped else None
        )

    def line(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False, soft_wrap=True)

    def slow_paths(self, notes: Sequence[str]) -> None:
        """Print the findings of `engines.slow_paths.slow_paths`, one per line."""
        for note in notes:
            self.line(f"slower than it could be: {note}")

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print one table with the keys of the first row as columns."""
        columns = list(rows[0]) if rows else []
        table = Table()
        for column in columns:
            numeric = any(isinstance(row.get(column), int | float) for row in rows)
            names = [len(str(row.get(column))) for row in rows] if column == columns[0] else [0]
            table.add_column(
                column.replace("_", " "),
                justify="right" if numeric else "left",
                overflow="fold",
                min_width=min(48, max(names)),  # names of layers differ at their ends
            )
        for row in rows:
            table.add_row(*(cell(column, row.get(column)) for column in columns))
        self._console.print(table, markup=False)


@contextmanager
def talk(
    context: typer.Context, quiet: bool, json_file: Path | None, kept: str = ""
) -> Iterator[Talk]:
    """Context of one run of a verb: output, errors and the JSON record.

    An expected error or Ctrl-C prints one sentence and exits with code 2.

    Args:
        context: arguments of the command line, for the record.
        quiet: print errors only.
        json_file: file for the record, written after the verb has succeeded.
        kept: end of the sentence after Ctrl-C or on a full disk, about unfinished work.
    """
    with one_sentence(kept), warnings.catch_warnings():
        output = Talk(quiet)
        warnings.showwarning = lambda message, *_, **__: output.reporter.line(f"warning: {message}")
        if json_file is not None:
            check_json_path(json_file)
        keep_libraries_silent(quiet)
        yield output
        if json_file is not None:
            write_json(json_file, json_record(context, output.results))


@contextmanager
def one_sentence(kept: str) -> Iterator[None]:
    """Turn expected errors and Ctrl-C into one line on stderr and exit code 2.

    Expected errors are bad input, a full disk and files that cannot be read or written.
    """
    try:
        yield
    except KeyboardInterrupt:
        sentence = f"interrupted{kept}"
    except StepQuantError as error:
        sentence = str(error)
    except Exception as error:
        refusal = sentence_of(error, kept)
        if refusal is None:
            raise  # a bug in stepquant: show its traceback
        sentence = refusal
    else:
        return
    typer.echo(" ".join(sentence.splitlines()), err=True)
    raise typer.Exit(NOT_DONE)


def sentence_of(error: Exception, kept: str) -> str | None:
    """Return a sentence for an error of the operating system, or None for other errors."""
    number = getattr(error, "errno", None)
    # safetensors reports the operating system's errors as text only.
    if number in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in str(error):
        return FULL_DISK + kept
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return (
            f"'{error.filename}' cannot be read or written ({error.strerror.lower()}): check the "
            "path and its permissions"
        )
    return None


def keep_libraries_silent(quiet: bool) -> None:
    """Silence the progress bars and log messages of diffusers and transformers.

    `quiet` also silences the progress bars of downloads.
    """
    from diffusers.utils import logging
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    without_bars = quiet or are_progress_bars_disabled()

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if find_spec("transformers") is not None:  # the library of text encoders
        from transformers.utils import logging as text_logging

        text_logging.disable_progress_bar()
        text_logging.set_verbosity_error()
    # transformers has disabled the bars of downloads, too.
    if without_bars:
        disable_progress_bars()
    else:
        enable_progress_bars()


def check_json_path(path: Path) -> None:
    """Check the place of the JSON record before the verb starts its work.

    Raises:
        StepQuantError: `path` is a folder, or its parent folder does not exist.
    """
    if path.is_dir():
        raise StepQuantError(f"--json '{path}' is a folder: expected the name of a file")
    if not path.parent.is_dir():
        raise StepQuantError(
            f"--json '{path}' cannot be written: expected its folder '{path.parent}' to exist"
        )


def json_record(context: typer.Context, results: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON record: verb, versions, all arguments with their values, and results."""
    _, _, verb = context.command_path.partition(" ")
    hidden = ("json_file", "quiet")
    return {
        "verb": verb,
        "stepquant_version": __version__,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
        "arguments": {
            name.rstrip("_"): value for name, value in context.params.items() if name not in hidden
        },
        "results": results,
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` to `path`, completely or not at all."""
    text = json.dumps(plain(record), indent=2, allow_nan=False) + "\n"
    atomic_write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def plain(value: Any) -> Any:
    """Return `value` as JSON values: paths become text, and NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def cell(column: str, value: Any) -> str:
    """Format a value for a table; bytes in kB (10^3 bytes) or MB (10^6 bytes)."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if column.endswith("bytes"):
        return f"{value / 1e6:,.2f} MB" if value >= 1e6 else f"{value / 1e3:,.2f} kB"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(cell("", entry) for entry in value)
    return str(value)
