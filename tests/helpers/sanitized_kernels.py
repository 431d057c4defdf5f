"""A program that runs the tests of the native kernels with the compiler's sanitizers on.

`python sanitized_kernels.py FOLDER` copies the package to FOLDER, compiles its kernels there with
checks of addresses and of undefined behaviour, and runs their tests on the copy. Emulated products
are compiled with the same checks; `--quick` leaves them out, which take most of the time. An error
ends the process of the tests, and fails this one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from stepquant.runtime.ops.native import build

ROOT = Path(__file__).parents[2]
TESTS = (
    "test_native_products.py",
    "test_product_codes.py",
    "test_product_layouts.py",
    "test_product_levels.py",
    "test_native_attention.py",
    "test_fused.py",
    "test_fused_rows.py",
    "test_fused_non_finite.py",
)
# Emulated products take long with checks: threads and bfloat16 results are the same code for all.
CHOICE = "not (emulated and (threads or dtype1))"
QUICK = "not emulated"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")


def libraries(compiler: list[str]) -> list[str] | None:
    """Libraries that Python has to load first, or None where the compiler has no sanitizers."""
    nothing = [*compiler, *SANITIZERS, "-x", "c++", "-shared", os.devnull, "-o", os.devnull]
    if subprocess.run(nothing, capture_output=True, check=False).returncode:
        return None
    found = []
    # The address sanitizer takes over the throwing of exceptions, whose library must be there.
    for name in ("libasan.so", "libstdc++.so"):
        asked = [*compiler, f"-print-file-name={name}"]
        path = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(path).is_absolute():
            return None
        found.append(path)
    return found


def main(folder: Path, choice: str) -> str | int:
    """What to exit with."""
    compiler = build.compiler()
    preloaded = None if compiler is None else libraries(compiler)
    if compiler is None or preloaded is None:
        print("skipped: no C++ compiler with sanitizers for addresses and undefined behaviour")
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("_kernels.*", "__pycache__", "assets")
    shutil.copytree(ROOT / "src", folder, ignore=ignored)
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "CXX": " ".join([*compiler, *SANITIZERS]),
        "OMP_NUM_THREADS": "1",
    }
    compiling = [sys.executable, "-m", "stepquant.runtime.ops.native"]
    if subprocess.run(compiling, env=environment, check=False).returncode:
        return "the kernels do not compile with sanitizers"
    tests = [str(ROOT / "tests/runtime/ops" / name) for name in TESTS]
    # Captured, the report of an error would end with the process.
    options = ["-q", "--capture=no", "-p", "no:cacheprovider", "-k", choice]
    testing = [sys.executable, "-m", "pytest", *options, *tests]
    environment |= {
        "LD_PRELOAD": " ".join(preloaded),
        # Python and torch keep memory until they end.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(testing, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    quick = "--quick" in sys.argv[2:]
    sys.exit(main(Path(sys.argv[1]).absolute(), QUICK if quick else CHOICE))
