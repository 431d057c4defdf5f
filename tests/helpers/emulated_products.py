"""Integer products of instruction sets that the machine lacks, compiled from plain C++.

`emulated/` has headers with the compiler's names that define the few intrinsics of each set.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from stepquant.runtime.ops import native
from stepquant.runtime.ops.native import Library, build

SERIAL = ("-fopenmp-simd",)
HEADERS = Path(__file__).parent / "emulated"
# The macro by which `tiles.h` chooses the products of a level.
MACROS = {
    "avx_vnni": "__AVXVNNI__",
    "vnni": "__AVX512VNNI__",
    "amx": "__AMX_INT8__",
    "neon": "__ARM_NEON",
    "dotprod": "__ARM_FEATURE_DOTPROD",
    "i8mm": "__ARM_FEATURE_MATMUL_INT8",
}


def emulated(level: str, folder: Path) -> Library:
    """The machine's library with the products of `level`, a key of MACROS, compiled to `folder`.

    Raises OSError where there is no library or no compiler.
    """
    compiler = build.compiler()
    if compiler is None:
        raise OSError("no C++ compiler")
    target = folder / f"{level}.so"
    if not target.exists():
        # Those of ARM without OpenMP, as on a Mac.
        flags = (*build.FLAGS, *(SERIAL if level in build.ARM.product_levels else build.OPENMP))
        options = [f"-DISA={level}", f"-D{MACROS[level]}", f"-I{HEADERS}", "-shared"]
        command = [*compiler, *flags, *options, build.PRODUCTS, "-o", str(target)]
        done = subprocess.run(
            command, cwd=build.FOLDER, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    library = Library()
    products = getattr(ctypes.CDLL(str(target)), f"products_{level}")
    products.argtypes, products.restype = native.PRODUCT_ARGUMENTS, ctypes.c_int32
    library.products, library.product_level, library.attention = products, level, None
    return library
