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

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / "_kernels.so"
TILES = ("tiles.h", "tiles_amx.h", "tiles_avx2.h", "tiles_avx512.h", "tiles_avx_vnni.h")
HEADERS = ("abi.h", "elementwise.h", "results.h", *TILES, "weights.h", "winograd.h")
KERNELS = ("images.cpp", "rows.cpp")  # compiled once for each of LEVELS
PRODUCTS = "products.cpp"  # compiled once for each of PRODUCT_LEVELS
ATTENTION = "attention.cpp"  # compiled for AMX
LEVEL = "level.cpp"

# Names of instruction sets in the order of `best_level`, and the flags that it checks for.
LEVELS: dict[str, tuple[str, ...]] = {
    "base": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ),
}
# The same for integer products: place i stands for bit i of `product_levels`, and later ones are
# faster. A compiler that does not know one leaves it out.
PRODUCT_LEVELS: dict[str, tuple[str, ...]] = {
    "avx2": LEVELS["avx2"],
    "avx_vnni": (*LEVELS["avx2"], "-mavxvnni"),
    "vnni": (*LEVELS["avx512"], "-mavx512vnni"),
}
PRODUCT_LEVELS["amx"] = (
    *(*PRODUCT_LEVELS["vnni"], "-mavx512bf16"),
    *("-mamx-tile", "-mamx-int8", "-mamx-bf16"),
)
# No contraction: torch rounds a product before it adds to it. Without errno and traps, which
# nobody looks at, the loops become vectors.
FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)


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


def build(target: Path = LIBRARY) -> str | None:
    """Write the library to `target`; None, or the reason why there is none now."""
    try:
        target.unlink(missing_ok=True)  # a library of other sources is worse than none
        return _build(target)
    except OSError as error:
        return f"the library could not be written: {error}"


def _build(target: Path) -> str | None:
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "AMD64"):
        return f"made for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    command = compiler()
    if command is None:
        return f"no C++ compiler: CXX is {os.environ.get('CXX')!r}, nor is one in the path"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiling, objects = [*command, *FLAGS, "-c"], []
        for level, options in LEVELS.items():
            for source in KERNELS:
                objects.append(str(Path(folder, f"{Path(source).stem}_{level}.o")))
                reason = _run([*compiling, source, "-o", objects[-1], *options, f"-DISA={level}"])
                if reason is not None:
                    return reason
        known = [level for level in PRODUCT_LEVELS if _takes(command, PRODUCT_LEVELS[level])]
        optional = [(PRODUCTS, level) for level in known]
        optional += [(ATTENTION, level) for level in known if level == "amx"]
        for source, level in optional:
            objects.append(str(Path(folder, f"{Path(source).stem}_{level}.o")))
            options = (*PRODUCT_LEVELS[level], f"-DISA={level}")
            reason = _run([*compiling, source, "-o", objects[-1], *options])
            if reason is not None:
                return reason
        objects.append(str(Path(folder, "level.o")))
        reason = _run([*compiling, LEVEL, "-o", objects[-1], f'-DSOURCES="{digest()}"'])
        if reason is not None:
            return reason
        library = str(Path(folder, "library.so"))
        # Linked without OpenMP: its functions are found in the library that torch has loaded, so
        # that there is one pool of threads.
        reason = _run([*command, "-shared", "-Wl,--as-needed", "-o", library, *objects])
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
