"""The guard around imports that belong to the `[evaluate]` extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stepquant.support.errors import StepQuantError


@contextmanager
def evaluate_extra() -> Iterator[None]:
    """Import torchmetrics inside this: where it is not installed, the error says what to do.

    The imports inside stand in functions, not at the top of their files, because torchmetrics
    takes longer to import than the rest of `stepquant` and most commands never need it.

    Raises:
        StepQuantError: torchmetrics cannot be found.
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
