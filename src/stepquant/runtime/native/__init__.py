"""Elementwise kernels in C++ for x86-64 CPUs, between torch's integer kernels.

The library is compiled when the package is built or installed (`hatch_build.py`), or by
`python -m stepquant.runtime.native`. Where there is none, or `STEPQUANT_NATIVE` is 0,
`runtime.fused` computes the same with torch, only slower.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import c_double, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from stepquant.runtime.native import build

SWITCH = "STEPQUANT_NATIVE"  # set to 0 or off, the library is not loaded

# The arguments of each function, as in its definition.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "group_norm_encode": (
        *(c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_double, c_int32),
        *(c_void_p, c_int64, c_int32),
    ),
    "encode_image": (c_void_p, c_void_p, c_int32, c_void_p, c_int32),
    "layer_norm_encode": (
        *(c_void_p, c_void_p, c_void_p, c_double, c_void_p, c_int64, c_void_p, c_int64),
        *(c_void_p, c_void_p, c_int64, c_int32),
    ),
    "gated_encode": (c_void_p, c_int32, c_void_p, c_void_p, c_int32),
    "encode_flat": (c_void_p, c_int32, c_int64, c_int32, c_void_p, c_void_p, c_int32),
    "linear_of_few_rows": (
        *(c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int32),
    ),
    "epilogue": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
}


class Library:
    """The functions of one instruction set, which `native.calls` calls."""

    def __init__(self, path: Path = build.LIBRARY, level: str | None = None) -> None:
        """Load them; `level` is one of `build.LEVELS`, or None for the machine's best.

        Raises OSError, with a sentence, where that does not work.
        """
        if not path.exists():
            raise OSError(
                f"there is no compiled library at {path}: "
                "python -m stepquant.runtime.native makes it"
            )
        # torch has to be loaded: the OpenMP functions that are used are those of its library.
        loaded = ctypes.CDLL(str(path))
        loaded.sources.restype = ctypes.c_char_p
        if loaded.sources().decode() != build.digest():
            raise OSError(
                f"the library at {path} is of other sources: "
                "python -m stepquant.runtime.native makes it anew"
            )
        best, names = loaded.best_level(), list(build.LEVELS)
        self.level = names[best] if level is None else level
        if names.index(self.level) > best:
            raise OSError(f"this machine has no {self.level}, its best is {names[best]}")
        for name, arguments in _ARGUMENTS.items():
            function = getattr(loaded, f"{name}_{self.level}")
            function.argtypes, function.restype = arguments, c_int32
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        """Only for names that are no function: those are attributes."""
        raise AttributeError(f"the native library has no function '{name}'")


@functools.cache
def _load() -> Library | str:
    if os.environ.get(SWITCH, "").lower() in ("0", "off"):
        return f"{SWITCH} is {os.environ[SWITCH]}"
    try:
        return Library()
    except (OSError, AttributeError) as error:  # no attribute: it is another library's file
        return str(error)


def library() -> Library | None:
    """The machine's library, loaded by the first call, or None."""
    loaded = _load()
    return loaded if isinstance(loaded, Library) else None


def available() -> bool:
    """Whether there are native kernels."""
    return library() is not None


def why_not() -> str | None:
    """Why there are none, in a sentence, or None where there are."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None
