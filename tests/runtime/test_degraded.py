"""Without VNNI, without the native library, with more threads: the same numbers, and told."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stepquant
from fast_models import TABLES, packed
from stepquant.runtime.kernels import onednn
from stepquant.runtime.ops import native

SETTINGS = {
    "nothing": "NOTHING=1",
    "avx512": "ONEDNN_MAX_CPU_ISA=AVX512_CORE",
    "avx2": "ONEDNN_MAX_CPU_ISA=AVX2",
    "no-library": "STEPQUANT_NATIVE=0",
}

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the check forks")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `degraded.py` finds in each setting."""
    folder = tmp_path_factory.mktemp("models")
    for bits in (8, 4):
        path = folder / f"{bits}.pickle"
        path.write_bytes(pickle.dumps(packed("sd", TABLES, bits)))
    script = Path(__file__).parents[1] / "helpers" / "degraded.py"
    places = [Path(stepquant.__file__).parents[1], script.parent]
    result = subprocess.run(
        [sys.executable, str(script), str(folder), *SETTINGS.values()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    found = {record["setting"]: record for record in map(json.loads, result.stdout.splitlines())}
    return {name: found[setting] for name, setting in SETTINGS.items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_batches_and_threads_give_the_reference_kernels_numbers(
    setting: str, records: dict[str, dict[str, Any]]
) -> None:
    """A value on the border of two codes may go either way; nothing else differs."""
    for key in ("errors", "threads"):
        for errors in records[setting][key].values():
            assert len(errors) == 3 and max(errors) < 0.02


@pytest.mark.parametrize("setting", SETTINGS)
def test_bfloat16_is_as_near_to_float32_as_on_the_reference_kernel(
    setting: str, records: dict[str, dict[str, Any]]
) -> None:
    for pairs in records[setting]["bfloat16"].values():
        ours, theirs = (sum(errors) for errors in zip(*pairs, strict=True))
        assert ours < 1.2 * theirs + 0.01


@pytest.mark.parametrize("setting", ["avx512", "avx2", "no-library"])
def test_no_vnni_is_told_where_our_products_do_not_run(
    setting: str, records: dict[str, dict[str, Any]]
) -> None:
    record = records[setting]
    if onednn.ONEDNN.why_not(packed("sd").conv_in.spec, packed("sd").conv_in.weight_packed.device):
        pytest.skip("no oneDNN kernels")
    told = [note for note in record["notes"] if "no VNNI" in note]
    assert bool(told) == (record["pairs_saturate"] and not record["native"])
    name, _, cap = SETTINGS[setting].partition("=")
    if name == "ONEDNN_MAX_CPU_ISA":
        assert all(note.endswith(f"no VNNI, as ONEDNN_MAX_CPU_ISA is {cap}") for note in told)


def test_no_library_is_told(records: dict[str, dict[str, Any]]) -> None:
    record = records["no-library"]
    assert not record["native"]
    if not record["pairs_saturate"]:
        assert any(note.endswith(": STEPQUANT_NATIVE is 0") for note in record["notes"])
    plain = records["nothing"]
    assert plain["native"] == ("STEPQUANT_NATIVE" not in os.environ and native.available())
    assert (
        plain["native"] == (not any("native pass" in note for note in plain["notes"]))
        or (plain["pairs_saturate"])
    )
