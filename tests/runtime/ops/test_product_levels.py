"""Which instruction sets the native library takes."""

from __future__ import annotations

import pytest

from product_cases import LEVELS, library
from stepquant.runtime.ops import native
from stepquant.runtime.ops.native import Library, build

ALL_X86 = tuple(build.X86.product_levels)


@pytest.mark.skipif(build.X86.levels != build.LEVELS, reason="a cap names x86-64's sets only")
@pytest.mark.parametrize(
    ("cap", "expected", "passes"),
    [
        ("", ALL_X86, "avx512"),
        ("ALL", ALL_X86, "avx512"),
        ("default", ALL_X86, "avx512"),
        ("AVX512_CORE_AMX", ALL_X86, "avx512"),
        ("avx10_1_512_amx", ALL_X86, "avx512"),
        ("AVX512_CORE_BF16", ("avx2", "avx_vnni", "vnni"), "avx512"),
        ("AVX512_CORE_VNNI", ("avx2", "avx_vnni", "vnni"), "avx512"),
        ("AVX512_CORE", ("avx2", "avx_vnni"), "avx512"),
        ("AVX2_VNNI_2", ("avx2", "avx_vnni"), "avx2"),
        ("AVX2_VNNI", ("avx2", "avx_vnni"), "avx2"),
        ("AVX2", ("avx2",), "avx2"),
        ("AVX", (), "base"),
        ("SSE41", (), "base"),
    ],
)
def test_a_cap_of_onednn_is_one_of_ours(
    cap: str, expected: tuple[str, ...], passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    uncapped = {name: isinstance(library(name), Library) for name in LEVELS}
    if not native.available():
        pytest.skip(str(native.why_not()))
    best = Library().level
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", cap)
    for level in LEVELS:
        found = library.__wrapped__(level)
        assert isinstance(found, Library) == (level in expected and uncapped[level])
        assert isinstance(found, Library) or "has no integer products for" in found
    names = list(build.LEVELS)
    assert Library().level == min(best, passes, key=names.index)
