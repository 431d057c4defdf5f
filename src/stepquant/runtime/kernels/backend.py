"""The names of the backends that a user can choose."""

from __future__ import annotations

from enum import Enum


class Backend(str, Enum):
    """The backend that runs integer layers; a plain string with the same value works as well.

    `register_kernel` may add names that are not members.
    """

    AUTO = "auto"
    """The first kernel, in order of preference, that supports the layer."""
    NATIVE = "native"
    ONEDNN = "onednn"
    INT_MM = "int_mm"
    REFERENCE = "reference"

    # As in `enum.StrEnum`, which Python 3.10 lacks.
    __str__ = str.__str__
    __format__ = str.__format__  # type: ignore[assignment]
