"""C++ kernels for x86-64 and 64-bit ARM CPUs: integer products and fused passes.

Building or installing the package compiles the library (`hatch_build.py`), and so does
`python -m stepquant.runtime.ops.native`. Without the library, or if `STEPQUANT_NATIVE` is 0,
`ops.fused` falls back to torch operations, and integer layers to oneDNN's kernels: slower, with the
same results.

Integer products need AVX2, AVX-VNNI, AVX-512 VNNI or AMX on x86-64, and NEON on ARM, where they use
dot products and matrix products if the CPU has them. On x86-64, a cap on oneDNN's instruction set
also applies to integer products and fused passes.
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

SWITCH = "STEPQUANT_NATIVE"  # 0 or off: do not load the library
ISA_CAPS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # the first one that is set applies

# Argument types of each function, as in its C++ definition.
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
    """The library's functions for one instruction set; `native.calls` calls them.

    `products` and `product_level` are None if the machine or the library's compiler supports none
    of `build.PRODUCT_LEVELS`, or if the cap on oneDNN's instruction set forbids them. `attention`
    is None unless `product_level` is "amx".
    """

    def __init__(
        self,
        path: Path = build.LIBRARY,
        level: str | None = None,
        product_level: str | None = None,
    ) -> None:
        """Load the library at `path`.

        Args:
            path: The compiled library.
            level: A key of `build.LEVELS`; None: the best that machine and cap allow.
            product_level: A key of `build.PRODUCT_LEVELS`; None: the best that machine and cap
                allow.

        Raises:
            OSError: There is no library, it does not match this package, or the machine does not
                support a level. The message is a sentence.
        """
        if not path.exists():
            raise OSError(
                f"there is no compiled library at {path}: run "
                "python -m stepquant.runtime.ops.native to compile it"
            )
        # torch must be loaded first, because the library uses its OpenMP runtime.
        loaded = ctypes.CDLL(str(path))
        loaded.sources.restype = ctypes.c_char_p
        if loaded.sources().decode() != build.digest():
            raise OSError(
                f"the library at {path} was compiled from other sources: run "
                "python -m stepquant.runtime.ops.native to compile it again"
            )
        loaded.layout.restype = ctypes.c_char_p
        differs = structures.difference(loaded.layout().decode())
        if differs is not None:
            raise OSError(f"the library at {path} does not match this package: {differs}")
        best, names = loaded.best_level(), list(build.LEVELS)
        allowed = [name for name in names[: best + 1] if not _forbids(name)]
        self.level = allowed[-1] if level is None else level
        if names.index(self.level) > best:
            raise OSError(
                f"this machine does not support {self.level}: its best level is {names[best]}"
            )
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
                f"this machine has no integer products for {product_level}: expected one of "
                f"{', '.join(products) or 'none'}"
            )
        self.products = products.get(self.product_level or "")
        self.attention = getattr(loaded, f"attention_{self.product_level}", None)
        if self.attention is not None:
            self.attention.argtypes, self.attention.restype = _ATTENTION_ARGUMENTS, c_int32

    def __getattr__(self, name: str) -> Any:
        """Raise AttributeError; Python calls this only for names that are not attributes."""
        raise AttributeError(f"the native library has no function '{name}'")


def _product_levels(loaded: ctypes.CDLL) -> dict[str, Any]:
    """The product functions that machine and cap allow, by level, fastest first."""
    found, runs = {}, loaded.product_levels()
    for place, name in reversed(list(enumerate(build.PRODUCT_LEVELS))):
        if not runs >> place & 1 or _forbids(name) or not hasattr(loaded, f"products_{name}"):
            continue
        found[name] = getattr(loaded, f"products_{name}")
        found[name].argtypes, found[name].restype = PRODUCT_ARGUMENTS, c_int32
    return found


def cap() -> str:
    """The cap on oneDNN's instruction set, in capitals; "ALL" without a cap."""
    found = next((os.environ[name].upper() for name in ISA_CAPS if os.environ.get(name)), "ALL")
    return "ALL" if found == "DEFAULT" else found


def _forbids(level: str) -> bool:
    """Whether the cap on oneDNN's instruction set rules out the instructions of `level`.

    `level` is a key of `build.LEVELS` or of `build.PRODUCT_LEVELS`. Caps name x86-64 instruction
    sets, so they never forbid an ARM level.
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
    except (OSError, AttributeError) as error:  # AttributeError: the file is another library
        return str(error)


_INSTEAD: ContextVar[Library | None] = ContextVar("instead", default=None)


@contextmanager
def called_instead(library: Library) -> Iterator[None]:
    """Make `library()` return the given library within this context, in this thread only."""
    token = _INSTEAD.set(library)
    try:
        yield
    finally:
        _INSTEAD.reset(token)


def library() -> Library | None:
    """The machine's library, or None; the first call loads it."""
    instead = _INSTEAD.get()
    if instead is not None:
        return instead
    loaded = _load()
    return loaded if isinstance(loaded, Library) else None


def available() -> bool:
    """Whether the native kernels are available."""
    return library() is not None


def why_no_products() -> Refusal | None:
    """Why native integer products are unavailable, or None."""
    loaded = _load()
    if isinstance(loaded, str):
        return Refusal(RefusalCode.NO_LIBRARY, loaded)
    if loaded.products is not None:
        return None
    return Refusal(
        RefusalCode.NO_PRODUCTS,
        f"the machine or the compiler supports none of {', '.join(build.PRODUCT_LEVELS)}, or a "
        "cap on oneDNN's instruction set excludes them",
    )


def why_not() -> Refusal | None:
    """Why the library is unavailable, or None."""
    loaded = _load()
    return Refusal(RefusalCode.NO_LIBRARY, loaded) if isinstance(loaded, str) else None
