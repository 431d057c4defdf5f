from __future__ import annotations

import pickle

import pytest

from stepquant.support.errors import LONGEST, StepQuantError


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x00", "a\nb", "\r", "\x9b31m", "\u202etxt", "\u2028"], ids=ascii
)
def test_characters_that_act_on_a_terminal_become_spaces(text):
    sentence = str(StepQuantError(f"the layer '{text}' is not there"))
    assert sentence.isprintable() and sentence.startswith("the layer '")
    assert len(sentence) == len(f"the layer '{text}' is not there")


def test_a_long_sentence_is_cut_in_its_middle():
    sentence = str(StepQuantError("start " + "x" * 10**6 + " end"))
    assert len(sentence) < LONGEST + 60
    assert sentence.startswith("start x") and sentence.endswith("x end")
    assert "characters left out" in sentence


def test_an_ordinary_sentence_stays_as_it_is():
    sentence = "'été/模型' has 3 bits: expected 4 (±1)"
    error = StepQuantError(sentence)
    assert str(error) == sentence
    assert str(pickle.loads(pickle.dumps(error))) == sentence
