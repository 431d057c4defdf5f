"""The forms that the functions of `runtime.fused` come in, for the tests."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from stepquant.runtime import fused
from stepquant.runtime.native import Library, build, calls

NAMES = ("group_norm_encode", "encode", "layer_norm_encode", "gated_encode", "epilogue")
PATHS = ("plain", *build.LEVELS)


class Path:
    """The functions of one form: "plain", or a native instruction set."""

    def __init__(self, name: str) -> None:
        if name == "plain":
            for each in NAMES:
                setattr(self, each, getattr(fused, f"plain_{each}"))
            return
        library = _library(name)
        if isinstance(library, str):
            pytest.skip(library)
        for each in NAMES:
            setattr(self, each, functools.partial(getattr(calls, each), library))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@functools.cache
def _library(level: str) -> Library | str:
    try:
        return Library(level=level)
    except OSError as error:
        return str(error)
