"""Compiles the native kernels, for `python -m stepquant.runtime.ops.native`.

`hatch_build.py` also loads this file, by its path, to build a wheel or install the package.
Therefore this file imports the standard library only.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / ("_kernels.dylib" if sys.platform == "darwin" else "_kernels.so")
X86_TILES = ("tiles_amx.h", "tiles_avx2.h", "tiles_avx512.h", "tiles_avx_vnni.h")
ARM_TILES = ("tiles_dotprod.h", "tiles_i8mm.h", "tiles_neon.h")
TILES = ("tiles.h", *X86_TILES, *ARM_TILES)
HEADERS = ("abi.h", "elementwise.h", "results.h", "threads.h", *TILES, "weights.h", "winograd.h")
KERNELS = ("images.cpp", "rows.cpp")  # compiled once for each of LEVELS
PRODUCTS = "products.cpp"  # compiled once for each of PRODUCT_LEVELS
ATTENTION = "attention.cpp"  # compiled for AMX
LEVEL = "level.cpp"


class Family(NamedTuple):
    """The instruction sets of a CPU family, each with its compiler options."""

    # Slowest first. `best_level` in level.cpp numbers them in this order, and checks what the CPU
    # supports.
    levels: dict[str, tuple[str, ...]]
    # The same for integer products; entry i is bit i of `product_levels` in level.cpp. The build
    # omits levels whose options the compiler does not support.
    product_levels: dict[str, tuple[str, ...]]


_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (
    *(*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
)
_VNNI = (*_AVX512, "-mavx512vnni")
_AMX = (*_VNNI, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16")
X86 = Family(
    levels={"base": (), "avx2": _AVX2, "avx512": _AVX512},
    product_levels={
        "avx2": _AVX2,
        "avx_vnni": (*_AVX2, "-mavxvnni"),
        "vnni": _VNNI,
        "amx": _AMX,
    },
)
# Without -march, Apple's compiler uses the M1's instructions everywhere.
ARM = Family(
    levels={"base": ("-march=armv8-a",)},
    product_levels={
        "neon": ("-march=armv8-a",),
        "dotprod": ("-march=armv8.2-a+dotprod",),
        "i8mm": ("-march=armv8.2-a+i8mm",),
    },
)
# By the names of `platform.machine()`. Big-endian CPUs have other names.
MACHINES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
PLATFORMS = (("linux", X86), ("linux", ARM), ("darwin", ARM))
# The levels of this machine; on other CPUs, which have no library, "base" alone.
LEVELS, PRODUCT_LEVELS = MACHINES.get(platform.machine().lower(), Family({"base": ()}, {}))

# No contraction, because torch rounds a product before it adds it. errno and floating-point traps
# are unused, and without them the compiler vectorizes more loops.
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# Compiled but not linked with OpenMP: the kernels call the OpenMP runtime that torch has loaded, so
# that both share one thread pool.
OPENMP = ("-fopenmp",)
SHARED = ("-shared", "-Wl,--as-needed")
# Apple's compiler has no OpenMP, and torch's runtime is untested with these kernels on a Mac, so
# they run in one thread there.
MAC_VERSION = "11.0"  # the first macOS for ARM
MAC_FLAGS = ("-fopenmp-simd", f"-mmacosx-version-min={MAC_VERSION}")
MAC_SHARED = ("-dynamiclib", f"-mmacosx-version-min={MAC_VERSION}")


def digest() -> str:
    """Return the digest of all sources, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name in (*HEADERS, *KERNELS, PRODUCTS, ATTENTION, LEVEL, Path(__file__).name):
        found.update((FOLDER / name).read_bytes())
    return found.hexdigest()[:16]


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler: `CXX`, else g++ or c++ if PATH has one, else None."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in ("g++", "c++") if shutil.which(name)), None)


def build(
    target: Path = LIBRARY, system: str = sys.platform, machine: str = platform.machine()
) -> str | None:
    """Compile the library to `target`; return None, or why it failed.

    `system` and `machine` name the platform that the library is for. A cross compiler may target
    another platform than this one.
    """
    try:
        target.unlink(missing_ok=True)  # a stale library is worse than none
        return _build(target, system, MACHINES.get(machine.lower()), machine)
    except OSError as error:
        return f"cannot write the library: {error}"


def _build(target: Path, system: str, family: Family | None, machine: str) -> str | None:
    if family is None or (system, family) not in PLATFORMS:
        return (
            "expected Linux on x86-64 or 64-bit ARM, or macOS on ARM, but this is "
            f"{system} on {machine}"
        )
    command = compiler()
    if command is None:
        chosen = os.environ.get("CXX")
        return (
            f"the C++ compiler '{chosen}' is not in PATH: correct or unset CXX"
            if chosen
            else "PATH has no C++ compiler: install g++, or set CXX"
        )
    mac = system == "darwin"
    flags = (*FLAGS, *(MAC_FLAGS if mac else OPENMP))
    levels = family.product_levels
    known = [level for level in levels if _takes(command, levels[level])]
    units = [
        *((source, level, family.levels[level]) for level in family.levels for source in KERNELS),
        *((PRODUCTS, level, levels[level]) for level in known),
        *((ATTENTION, level, levels[level]) for level in known if level == "amx"),
    ]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        objects = []
        for source, level, options in units:
            objects.append(str(Path(folder, f"{Path(source).stem}_{level}.o")))
            call = [*command, *flags, *options, f"-DISA={level}", "-c", source, "-o", objects[-1]]
            reason = _run(call)
            if reason is not None:
                return reason
        objects.append(str(Path(folder, "level.o")))
        named = f'-DSOURCES="{digest()}"'
        reason = _run([*command, *flags, named, "-c", LEVEL, "-o", objects[-1]])
        if reason is not None:
            return reason
        library = str(Path(folder, "library"))
        reason = _run([*command, *(MAC_SHARED if mac else SHARED), "-o", library, *objects])
        if reason is not None:
            return reason
        os.replace(library, target)
    return None


def _takes(command: list[str], options: tuple[str, ...]) -> bool:
    """Whether the compiler supports the options."""
    nothing = [*command, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return _run([*nothing, *options]) is None


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"cannot start {command[0]}: {error}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    errors = [line for line in lines if "error" in line]
    return f"{command[0]} failed with exit code {done.returncode}: {(errors or lines)[0]}"
