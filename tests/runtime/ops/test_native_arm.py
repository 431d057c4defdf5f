"""The kernels for ARM, cross-compiled and run by an emulator, with and without each level."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from stepquant.runtime.ops.native import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # of the emulated system
CHECK = Path(__file__).parents[2] / "helpers/products_check.cpp"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
# The emulated CPUs, with the bits of `product_levels`.
CPUS = {"cortex-a72": 0b001, "cortex-a76": 0b011, "max": 0b111}

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)}")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library and the program that checks it."""
    folder = tmp_path_factory.mktemp("arm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", COMPILER)
        assert build.build(folder / "library.so", "linux", "aarch64") is None
    # OpenMP comes with the program, as it comes with torch.
    options = ["-O2", "-std=c++17", "-fopenmp", "-Wl,--no-as-needed", f"-I{build.FOLDER}"]
    command = [COMPILER, *options, str(CHECK), "-ldl", "-o", str(folder / "check")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("cpu", "bits"), CPUS.items(), ids=CPUS)
def test_arm_kernels_are_exact(compiled: Path, cpu: str, bits: int) -> None:
    command = [EMULATOR, "-L", LIBRARIES, "-cpu", cpu, str(compiled / "check")]
    done = subprocess.run(
        [*command, str(compiled / "library.so"), *build.ARM.product_levels],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == bits
