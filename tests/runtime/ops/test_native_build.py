"""The library is made where it can be, and refused where it does not fit."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

from stepquant.runtime.ops import native
from stepquant.runtime.ops.native import Library, build, structures
from stepquant.runtime.ops.native.structures import Structure


def test_available_or_a_reason() -> None:
    assert native.available() == (native.why_not() is None) == (native.library() is not None)


def test_a_missing_library_is_a_reason(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="there is no compiled library"):
        Library(tmp_path / "nothing.so")


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "library.so"
    path.write_bytes(b"no library")
    with pytest.raises(OSError):
        Library(path)


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_a_library_of_other_sources_is_a_reason(tmp_path: Path) -> None:
    compiler = build.compiler()
    assert compiler is not None
    path = tmp_path / "library.so"
    source = build.FOLDER / build.LEVEL
    options = ['-DSOURCES="of another day"', "-shared", "-fPIC", "-o", str(path)]
    subprocess.run([*compiler, str(source), *options], check=True)
    with pytest.raises(OSError, match="compiled from other sources"):
        Library(path)
    assert ctypes.CDLL(str(path)).best_level() in range(len(build.LEVELS))


def test_no_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    target = tmp_path / "library.so"
    target.write_bytes(b"an old one")
    reason = build.build(target, "linux", "x86_64")
    assert reason == "the C++ compiler 'no-such-compiler' is not in PATH: correct or unset CXX"
    assert not target.exists()


def test_a_path_without_a_compiler_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = build.build(tmp_path / "library.so", "linux", "x86_64")
    assert reason == "PATH has no C++ compiler: install g++, or set CXX"


@pytest.mark.parametrize(
    ("system", "machine"),
    [
        ("linux", "riscv64"),
        ("linux", "aarch64_be"),
        ("linux", "ppc64le"),
        ("darwin", "x86_64"),
        ("win32", "AMD64"),
    ],
)
def test_other_machines_are_a_reason(tmp_path: Path, system: str, machine: str) -> None:
    reason = build.build(tmp_path / "library.so", system, machine)
    assert reason is not None and reason.endswith(f"this is {system} on {machine}")
    assert list(tmp_path.iterdir()) == []


def test_a_mac_gets_no_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is asked for there."""
    calls = tmp_path / "calls"
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n'
        'while [ "$1" != "-o" ]; do shift; done\n[ "$2" = /dev/null ] || touch "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert build.build(tmp_path / "library.dylib", "darwin", "arm64") is None
    assert (tmp_path / "library.dylib").exists()
    *compiled, linked = calls.read_text().splitlines()
    for level, options in build.ARM.product_levels.items():
        (own,) = [call for call in compiled if f"-DISA={level}" in call]
        assert " ".join(options) in own and "products.cpp" in own
    assert all("-fopenmp " not in call for call in compiled)
    assert "-dynamiclib" in linked and "--as-needed" not in linked and "attention" not in linked


def test_a_failing_compiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    reason = build.build(tmp_path / "library.so")
    assert reason is not None and (
        "false failed with exit code 1" in reason or "expected Linux" in reason
    )
    assert list(tmp_path.iterdir()) == []


def test_what_the_compiler_knows_is_in_the_library(tmp_path: Path) -> None:
    """A level is left out only where the compiler does not know its instructions."""
    library, compiler = native.library(), build.compiler()
    if library is None or compiler is None:
        pytest.skip("no native library, or no compiler")
    empty = tmp_path / "empty.cpp"
    empty.write_text("")
    loaded = ctypes.CDLL(str(build.LIBRARY))
    for level, options in build.PRODUCT_LEVELS.items():
        call = [*compiler, *options, "-c", str(empty), "-o", str(tmp_path / "empty.o")]
        if subprocess.run(call, capture_output=True, check=False).returncode == 0:
            assert hasattr(loaded, f"products_{level}")
            assert hasattr(loaded, f"attention_{level}") == (level == "amx")


OTHER_SHAPES = {
    "a-field-less": Structure("Shape", "batch channels height"),
    "swapped-fields": Structure("Shape", "batch channels width height"),
    "a-structure-more": Structure("Shape", "batch channels height", ("grid", structures.GRID)),
}


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
@pytest.mark.parametrize("changed", OTHER_SHAPES.values(), ids=OTHER_SHAPES)
def test_a_structure_of_another_layout_is_refused(
    changed: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [changed if each is structures.SHAPE else each for each in structures.STRUCTURES]
    monkeypatch.setattr(structures, "STRUCTURES", tuple(others))
    with pytest.raises(OSError, match="does not match this package: the library has 'Shape 32: "):
        Library()


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_another_enumeration_and_a_missing_structure_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(structures.ACTIVATIONS, "relu", 4)
        with pytest.raises(OSError, match="Activation"):
            Library()
    monkeypatch.setattr(structures, "STRUCTURES", structures.STRUCTURES[:-1])
    with pytest.raises(OSError, match="does not match"):
        Library()
    monkeypatch.setattr(structures, "layout", lambda: [])
    with pytest.raises(OSError, match="describes 12 types"):
        Library()
