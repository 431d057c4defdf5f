"""Behaviours of diffusers' models on each kind of quantized model, as the committed table has them.

`python benchmarks/diffusers_behaviours.py` writes the table anew, with `--behaviour NAME` a few
rows of it. docs/reference/diffusers.md shows it.
"""

from __future__ import annotations

import pytest

from all_behaviours import BEHAVIOURS
from behaviour import FAILS, NOT_APPLICABLE, REFUSED, WORKS, first_word, outcome
from behaviour_subjects import FLOAT, MODELS, OWN, PEERS
from behaviour_table import cells, table

pytest.importorskip("peft", reason="LoRAs of diffusers need peft")
pytestmark = pytest.mark.usefixtures("one_thread")

OUTCOMES = {
    (name, kind, model): text
    for name, row in table()["outcomes"].items()
    for kind, entry in row.items()
    for model, text in cells(entry).items()
}
# What works for a peer and fails here, each with the reason.
BEHIND: dict[tuple[str, str], str] = {}


def quick(name: str, kind: str) -> str | None:
    """The model on which the default run tries the behaviour; it changes, so that all have a share.

    The slowest models are tried where no other has the behaviour. Kinds that differ in bits only
    take turns. The slow run tries all.
    """
    number = list(BEHAVIOURS).index(name)
    if kind in (("w4", "W8A8") if number % 2 else ("w8", "W4A4")):
        return None
    tried = [
        model
        for model in MODELS
        if first_word(OUTCOMES.get((name, kind, model), NOT_APPLICABLE)) != NOT_APPLICABLE
    ]
    tried = [model for model in tried if model not in ("sd", "sdxl", "sd3")] or tried
    if not tried or BEHAVIOURS[name].slow:
        return None
    return tried[(number + OWN.index(kind)) % len(tried)]


CELLS = [
    pytest.param(*cell, marks=() if quick(cell[0], cell[1]) == cell[2] else pytest.mark.slow)
    for cell in OUTCOMES
    if cell[1] in OWN
]


@pytest.mark.parametrize(("name", "kind", "model"), CELLS)
def test_a_behaviour_ends_as_the_table_says(name: str, kind: str, model: str) -> None:
    wanted = OUTCOMES[name, kind, model]
    found = outcome(name, kind, model, control=OUTCOMES[name, FLOAT, model])
    assert first_word(found) == first_word(wanted), f"{found}; the table has: {wanted}"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_the_float_model_is_the_control(name: str, model: str) -> None:
    found, wanted = outcome(name, FLOAT, model), OUTCOMES[name, FLOAT, model]
    assert first_word(found) == first_word(wanted), f"{found}; the table has: {wanted}"


def test_the_table_has_each_behaviour_as_its_function_describes_it() -> None:
    wanted = [[each.group, each.name, each.description] for each in BEHAVIOURS.values()]
    assert table()["behaviours"] == wanted
    assert set(table()["outcomes"]) == set(BEHAVIOURS)
    missing = [
        (name, kind, model)
        for name in BEHAVIOURS
        for kind in (FLOAT, *OWN)
        for model in MODELS
        if (name, kind, model) not in OUTCOMES
    ]
    assert not missing, f"run diffusers_behaviours.py --new for {missing[:3]}"


def test_a_refusal_is_one_sentence() -> None:
    refusals = {text for text in OUTCOMES.values() if first_word(text) == REFUSED}
    assert refusals and not any("\n" in text for text in refusals)


def test_nothing_fails_that_works_for_a_peer() -> None:
    """One row a behaviour and kind, whichever the models."""
    behind = {
        (name, kind)
        for (name, kind, model), text in OUTCOMES.items()
        if kind in OWN
        and first_word(text) == FAILS
        and any(OUTCOMES.get((name, peer, model)) == WORKS for peer in PEERS)
    }
    assert behind == set(BEHIND)
