"""Compiles the native kernels; `python -m stepquant.runtime.ops.native` calls it.

`hatch_build.py` loads this file by its path when a wheel is built or the package is installed, so
it needs the standard library only.
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
    """Instruction sets of a family of CPUs: their names, and the compiler's options for each."""

    # In the order of `best_level`, which checks for the options.
    levels: dict[str, tuple[str, ...]]
    # The same for integer products: place i stands for bit i of `product_levels`, and later ones
    # are faster. A compiler that does not know one leaves it out.
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
# Apple's compiler would take the instructions of the M1 everywhere, if it were not told otherwise.
ARM = Family(
    levels={"base": ("-march=armv8-a",)},
    product_levels={
        "neon": ("-march=armv8-a",),
        "dotprod": ("-march=armv8.2-a+dotprod",),
        "i8mm": ("-march=armv8.2-a+i8mm",),
    },
)
# What `platform.machine()` calls them. Big-endian CPUs have other names.
MACHINES = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}
PLATFORMS = (("linux", X86), ("linux", ARM), ("darwin", ARM))
# Those of this machine; where there is no library, names of nothing.
LEVELS, PRODUCT_LEVELS = MACHINES.get(platform.machine().lower(), Family({"base": ()}, {}))

# No contraction: torch rounds a product before it adds to it. Without errno and traps, which
# nobody looks at, the loops become vectors.
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# Linked without OpenMP: its functions are found in the library that torch has loaded, so that there
# is one pool of threads.
OPENMP = ("-fopenmp",)
SHARED = ("-shared", "-Wl,--as-needed")
# Apple's compiler comes without OpenMP. Whether the kernels would find its functions in the library
# that torch has loaded has not been tried on a Mac, so they run in one thread there.
MAC_VERSION = "11.0"  # the first for ARM
MAC_FLAGS = ("-fopenmp-simd", f"-mmacosx-version-min={MAC_VERSION}")
MAC_SHARED = ("-dynamiclib", f"-mmacosx-version-min={MAC_VERSION}")


def digest() -> str:
    """The state of the sources, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for name in (*HEADERS, *KERNELS, PRODUCTS, ATTENTION, LEVEL, Path(__file__).name):
        found.update((FOLDER / name).read_bytes())
    return found.hexdigest()[:16]


def compiler() -> list[str] | None:
    """The command of the C++ compiler: what `CXX` says, or the first one in the path."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else None
    return next(([name] for name in ("g++", "c++") if shutil.which(name)), None)


def build(
    target: Path = LIBRARY, system: str = sys.platform, machine: str = platform.machine()
) -> str | None:
    """Write the library to `target`; None, or the reason why there is none now.

    `system` and `machine` are those that the library is for, which a cross compiler can choose.
    """
    try:
        target.unlink(missing_ok=True)  # a library of other sources is worse than none
        return _build(target, system, MACHINES.get(machine.lower()), machine)
    except OSError as error:
        return f"the library could not be written: {error}"


def _build(target: Path, system: str, family: Family | None, machine: str) -> str | None:
    if family is None or (system, family) not in PLATFORMS:
        return (
            "made for Linux on x86-64 and 64-bit ARM, and for macOS on ARM, "
            f"this is {system} on {machine}"
        )
    command = compiler()
    if command is None:
        return f"no C++ compiler: CXX is {os.environ.get('CXX')!r}, nor is one in the path"
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
    """Whether the compiler knows the options."""
    nothing = [*command, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return _run([*nothing, *options]) is None


def _run(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{command[0]} did not start: {error}"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or ["no message"]
    errors = [line for line in lines if "error" in line]
    return f"{command[0]} failed with {done.returncode}: {(errors or lines)[0]}"
