"""The names of the kernels that a user may ask for."""

from __future__ import annotations

from enum import Enum


class Backend(str, Enum):
    """What integer layers run on; a string with the same characters does as well.

    `register_kernel` may add further names.
    """

    AUTO = "auto"
    """The first kernel, in order of preference, that takes the layer."""
    NATIVE = "native"
    ONEDNN = "onednn"
    INT_MM = "int_mm"
    REFERENCE = "reference"

    # As an `enum.StrEnum`, which Python 3.10 lacks.
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]
