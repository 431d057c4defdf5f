"""JSON from files that anybody may have written: bounded, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stepquant.support.errors import StepQuantError

LARGEST = 64 << 20  # bytes; the index of a model with a million shards' tensors has about as many


def read_json(path: Path, what: str) -> Any:
    """Return the value in the JSON file `path`; `what` says in errors what the file is.

    Raises:
        StepQuantError: the file cannot be read, is too large, or is not JSON.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise StepQuantError(
                f"'{path}' has {size} bytes: expected at most {LARGEST} as {what}; fetch or write "
                "the folder again"
            )
        return parse_json(path.read_text(encoding="utf-8"), f"'{path}'", what)
    except OSError as error:
        raise StepQuantError(
            f"'{path}' cannot be read ({error.strerror}): expected {what}; check the path and its "
            "permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise StepQuantError(
            f"'{path}' is not readable as JSON ({error}): expected {what} in UTF-8; fetch or write "
            "the folder again"
        ) from error


def parse_json(text: str, where: str, what: str) -> Any:
    """Return the value of the JSON `text`, which `where` holds as `what`.

    Raises:
        StepQuantError: the text is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise StepQuantError(
            f"{where} is nested too deeply to be read as JSON: expected {what}; fetch or write "
            "the folder again"
        ) from error
    except ValueError as error:
        raise StepQuantError(
            f"{where} is not readable as JSON ({error}): expected {what}; fetch or write the "
            "folder again"
        ) from error
