from __future__ import annotations

import pytest

from stepquant.support import json_text
from stepquant.support.errors import StepQuantError
from stepquant.support.json_text import read_json

BAD = {
    "not JSON": (b"{", "is not readable as JSON"),
    "empty": (b"", "is not readable as JSON"),
    "not UTF-8": (b"\xff\xfe", "expected a config in UTF-8"),
    "deep": (b"[" * 200_000, "nested too deeply"),
    "a number of many digits": (b"1" * 100_000, "is not readable as JSON"),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_a_bad_file_is_named(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(StepQuantError) as error:
        read_json(path, "a config")
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_file_that_is_absent_or_too_large_is_named(tmp_path, monkeypatch):
    with pytest.raises(StepQuantError, match=r"cannot be read \(No such file"):
        read_json(tmp_path / "config.json", "a config")
    (tmp_path / "config.json").write_text("[1, 2, 3]")
    assert read_json(tmp_path / "config.json", "a config") == [1, 2, 3]
    monkeypatch.setattr(json_text, "LARGEST", 8)
    with pytest.raises(StepQuantError, match="has 9 bytes: expected at most 8 as a config"):
        read_json(tmp_path / "config.json", "a config")
