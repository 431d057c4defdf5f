"""Guard for the imports that need the `[evaluate]` extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stepquant.support.errors import StepQuantError


@contextmanager
def evaluate_extra() -> Iterator[None]:
    """Context for imports of torchmetrics: a missing package becomes a helpful error.

    Callers import torchmetrics inside functions, not at the top of their files, because it takes
    longer to import than the rest of `stepquant` and most commands never need it.

    Raises:
        StepQuantError: torchmetrics is not installed; the message gives the install command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchmetrics":
            raise
        raise StepQuantError(
            "evaluation needs the package 'torchmetrics', which is not installed: "
            "run `pip install stepquant[evaluate]`"
        ) from error
