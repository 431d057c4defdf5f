from __future__ import annotations

import time

import pytest

from stepquant.support.errors import StepQuantError
from stepquant.support.yaml_text import parse_yaml

BOMB = "\n".join(
    f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" if i else "x0: &x0 [a, b, c]"
    for i in range(12)
)
BAD = {
    "aliases that stand for billions": (BOMB, "stands for more than 100000 values"),
    "a long text many times": (
        f"a: &a {'x' * 9000}\nb: [{', '.join(['*a'] * 9000)}]",
        "stands for more than 100000 values",
    ),
    "an alias inside itself": ("&a [*a]", "an alias inside what it stands for"),
    "deep": ("[" * 5000, "is nested"),
    "deep by indentation": ("".join(" " * i + "a:\n" for i in range(900)), "is nested"),
    "long": ("#" * (2 << 20), "has 2097152 characters"),
    "no YAML": ("a: b: c", "is not YAML"),
    "a tag of Python's": ("!!python/object/apply:os.system ['true']", "is not YAML"),
    "a date that is none": ("2001-99-99", "is not YAML"),
    "an unhashable key": ("? [a]\n: b", "is not YAML"),
    "two documents": ("a\n---\nb", "is not YAML"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD)
def test_bad_text_is_refused_at_once(text, words):
    started = time.monotonic()
    with pytest.raises(StepQuantError) as error:
        parse_yaml(text, "the recipe")
    assert words in str(error.value) and str(error.value).startswith("the recipe ")
    assert len(str(error.value)) < 5000 and time.monotonic() - started < 20


def test_ordinary_text_is_read():
    assert parse_yaml("a: &x {b: 1}\nc: [*x, *x]\n", "it") == {"a": {"b": 1}, "c": [{"b": 1}] * 2}
    assert parse_yaml("", "it") is None
    assert parse_yaml("3", "it") == 3
