"""Opening of safetensors files, with errors that tell a damaged file from an unreadable one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stepquant.support.errors import StepQuantError

SYSTEM_ERROR = re.compile(r"\(os error \d+\)")


@contextmanager
def opened(path: Path, what: str = "") -> Iterator[Any]:
    """Open the safetensors file `path`; `what` may say in errors what it should hold.

    Raises:
        StepQuantError: the file is absent, cannot be read, is cut short or damaged, or is of
            another format; also where that shows only as its tensors are read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise file_error(path, error, what) from error


def file_error(path: Path, error: Exception, what: str = "") -> StepQuantError:
    """Return the sentence for `error`, which reading the safetensors file `path` gave."""
    expected = f"expected {what}; " if what else ""
    # safetensors reports some errors of the operating system as text.
    if isinstance(error, OSError) or SYSTEM_ERROR.search(str(error)):
        reason = getattr(error, "strerror", None) or first_line(error)
        return StepQuantError(
            f"'{path}' cannot be read ({reason}): {expected}check the path and its permissions"
        )
    return StepQuantError(
        f"'{path}' is not a whole safetensors file ({first_line(error)}): {expected}it is cut "
        "short or damaged, so fetch or write it again"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, without its period."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
