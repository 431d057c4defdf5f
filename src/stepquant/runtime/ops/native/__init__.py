"""Kernels in C++ for x86-64 and 64-bit ARM CPUs: integer products, and what lies between them.

The library is compiled when the package is built or installed (`hatch_build.py`), or by
`python -m stepquant.runtime.ops.native`. Where there is none, or `STEPQUANT_NATIVE` is 0,
`ops.fused` and oneDNN's kernels compute the same with torch, only slower. Integer products are
there for CPUs with AVX2, AVX-VNNI, AVX-512 VNNI and AMX, and for ARM's NEON, its dot products and
its matrix products; what caps oneDNN's instruction set on x86-64 caps them, and the fused passes,
too.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from stepquant.runtime.ops.native import build, structures
from stepquant.support.refusal import Refusal, RefusalCode

SWITCH = "STEPQUANT_NATIVE"  # set to 0 or off, the library is not loaded
ISA_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the first that is set counts

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
    "encode_flat": (*(c_void_p, c_int32, c_int64, c_int64, c_int32, c_void_p, c_void_p, c_int32),),
    "epilogue": (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
}
_ATTENTION_ARGUMENTS = (c_void_p, c_float, c_int32)
PRODUCT_ARGUMENTS = (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int32)
FUNCTIONS = (*_ARGUMENTS, "products", "attention")


class Library:
    """The functions of one instruction set, which `native.calls` calls.

    `products` is None, and so is `product_level`, where the machine or the compiler that made the
    library knows none of `build.PRODUCT_LEVELS`, or the cap of oneDNN's instruction set forbids it.
    `attention` is None where that is not the last of these levels.
    """

    def __init__(
        self,
        path: Path = build.LIBRARY,
        level: str | None = None,
        product_level: str | None = None,
    ) -> None:
        """Load them; the levels are keys of `build.LEVELS` and of `build.PRODUCT_LEVELS`.

        None: the machine's best. Raises OSError, with a sentence, where that does not work.
        """
        if not path.exists():
            raise OSError(
                f"there is no compiled library at {path}: "
                "python -m stepquant.runtime.ops.native makes it"
            )
        # torch has to be loaded: the OpenMP functions that are used are those of its library.
        loaded = ctypes.CDLL(str(path))
        loaded.sources.restype = ctypes.c_char_p
        if loaded.sources().decode() != build.digest():
            raise OSError(
                f"the library at {path} is of other sources: "
                "python -m stepquant.runtime.ops.native makes it anew"
            )
        loaded.layout.restype = ctypes.c_char_p
        differs = structures.difference(loaded.layout().decode())
        if differs is not None:
            raise OSError(f"the library at {path} does not fit this package: {differs}")
        best, names = loaded.best_level(), list(build.LEVELS)
        allowed = [name for name in names[: best + 1] if not _forbids(name)]
        self.level = allowed[-1] if level is None else level
        if names.index(self.level) > best:
            raise OSError(f"this machine has no {self.level}, its best is {names[best]}")
        for name, arguments in _ARGUMENTS.items():
            function = getattr(loaded, f"{name}_{self.level}")
            function.argtypes, function.restype = arguments, c_int32
            setattr(self, name, function)
        products = _product_levels(loaded)
        if product_level is None:
            self.product_level = next(iter(products), None)
        elif product_level in products:
            self.product_level = product_level
        else:
            raise OSError(
                f"no integer products of {product_level} on this machine: there are those of "
                f"{', '.join(products) or 'no instruction set'}"
            )
        self.products = products.get(self.product_level or "")
        self.attention = getattr(loaded, f"attention_{self.product_level}", None)
        if self.attention is not None:
            self.attention.argtypes, self.attention.restype = _ATTENTION_ARGUMENTS, c_int32

    def __getattr__(self, name: str) -> Any:
        """Only for names that are no function: those are attributes."""
        raise AttributeError(f"the native library has no function '{name}'")


def _product_levels(loaded: ctypes.CDLL) -> dict[str, Any]:
    """The functions that this machine can run and that the cap allows, the fastest first."""
    found, runs = {}, loaded.product_levels()
    for place, name in reversed(list(enumerate(build.PRODUCT_LEVELS))):
        if not runs >> place & 1 or _forbids(name) or not hasattr(loaded, f"products_{name}"):
            continue
        found[name] = getattr(loaded, f"products_{name}")
        found[name].argtypes, found[name].restype = PRODUCT_ARGUMENTS, c_int32
    return found


def cap() -> str:
    """The instruction set that oneDNN is capped to, in capitals; "ALL" without a cap."""
    found = next((os.environ[name].upper() for name in ISA_CAPS if os.environ.get(name)), "ALL")
    return "ALL" if found == "DEFAULT" else found


def _forbids(level: str) -> bool:
    """Whether oneDNN, capped as it is, would not use the instructions of `level`.

    `level` is a key of `build.LEVELS` or of `build.PRODUCT_LEVELS`. Caps name instruction sets of
    x86-64, so none forbids those of ARM.
    """
    capped = cap()
    if capped == "ALL" or level == "base" or level in build.ARM.product_levels:
        return False
    if level == "amx":
        return "AMX" not in capped
    if level == "avx2":
        return capped in ("SSE41", "AVX")
    if level == "avx_vnni":
        return capped in ("SSE41", "AVX", "AVX2")
    if level == "avx512":
        return not capped.startswith(("AVX512_", "AVX10"))
    return not capped.startswith(("AVX512_CORE_", "AVX10"))


@functools.cache
def _load() -> Library | str:
    if os.environ.get(SWITCH, "").lower() in ("0", "off"):
        return f"{SWITCH} is {os.environ[SWITCH]}"
    try:
        return Library()
    except (OSError, AttributeError) as error:  # no attribute: it is another library's file
        return str(error)


_INSTEAD: ContextVar[Library | None] = ContextVar("instead", default=None)


@contextmanager
def called_instead(library: Library) -> Iterator[None]:
    """While this lasts, and in this thread, `library()` is the one given."""
    token = _INSTEAD.set(library)
    try:
        yield
    finally:
        _INSTEAD.reset(token)


def library() -> Library | None:
    """The machine's library, loaded by the first call, or None."""
    instead = _INSTEAD.get()
    if instead is not None:
        return instead
    loaded = _load()
    return loaded if isinstance(loaded, Library) else None


def available() -> bool:
    """Whether there are native kernels."""
    return library() is not None


def why_no_products() -> Refusal | None:
    """Why there are no native integer products, or None where there are."""
    loaded = _load()
    if isinstance(loaded, str):
        return Refusal(RefusalCode.NO_LIBRARY, loaded)
    if loaded.products is not None:
        return None
    return Refusal(
        RefusalCode.NO_PRODUCTS,
        f"the machine or the compiler has none of {', '.join(build.PRODUCT_LEVELS)}, or a cap of "
        "oneDNN's instruction set leaves them out",
    )


def why_not() -> Refusal | None:
    """Why there is no library, or None where there is one."""
    loaded = _load()
    return Refusal(RefusalCode.NO_LIBRARY, loaded) if isinstance(loaded, str) else None
