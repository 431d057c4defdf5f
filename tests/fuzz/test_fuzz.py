"""The attack itself: it is the same for each seed, and sees each kind of fault."""

from __future__ import annotations

import json
import time

import attack
import pytest
import torch
from mutations import mutate, random
from safetensors.torch import save_file
from subjects import Subject, digest, files, tree

from stepquant.support.errors import StepQuantError


def write(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"a": {"b": [1, 2, 3]}, "c": "x"}))
    save_file({"w": torch.arange(8.0), "v": torch.ones(2, 2)}, folder / "w.safetensors")


def refuse(folder, out):
    raise StepQuantError("the file is damaged: expected another one")


def outcomes(tmp_path, use, exact=True, cases=6):
    known = tree_of(tmp_path)

    def or_sound(folder, out):
        return digest() if tree(folder) == known else use(folder, out)

    subject = Subject("it", write, or_sound, files(".json", ".safetensors"), cases, exact)
    return attack.attack(subject, tmp_path / "fuzz", 0, range(cases))


def tree_of(tmp_path):
    write(tmp_path / "sound")
    return tree(tmp_path / "sound")


def test_the_same_seed_changes_the_same(tmp_path):
    found = []
    for name in ("a", "b"):
        texts = []
        for number in range(40):
            folder = tmp_path / f"{name}{number}"
            write(folder)
            texts.append(mutate(folder, ["config.json", "w.safetensors"], random.Random(number)))
            texts.append(tree(folder))
        found.append(texts)
    assert found[0] == found[1]
    assert len(set(found[0][1::2])) > 30


def test_refusals_and_sound_values_are_no_faults(tmp_path):
    counts, faults = outcomes(tmp_path, refuse)
    assert not faults and counts["refused"] + counts["same"] == 6


def fall_over(folder, out):
    raise KeyError("w")


def sleep(folder, out):
    try:
        time.sleep(5)
    except Exception:  # what catches errors does not catch this
        return None


def fill(folder, out):
    attack.peak = lambda: 3 << 20
    return digest()


def whole(folder, out):
    raise StepQuantError("")


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (fall_over, "KeyError"),
        (lambda *_: "other", "another value, without a word"),
        (sleep, "more than 0.2 s"),
        (fill, "MiB"),
        (whole, "no sentence"),
    ],
    ids=["traceback", "other value", "hang", "memory", "no sentence"],
)
def test_each_kind_of_fault_is_seen(tmp_path, monkeypatch, use, words):
    monkeypatch.setattr(attack, "SECONDS", 0.2)
    monkeypatch.setattr(attack, "peak", lambda: 0)
    _, faults = outcomes(tmp_path, use, cases=3)
    assert faults and words in faults[0] and faults[0].startswith("it ")


def test_values_that_anybody_may_set_may_give_any_result(tmp_path):
    counts, faults = outcomes(tmp_path, lambda *_: "other", exact=False)
    assert not faults and counts["other"] > 0
