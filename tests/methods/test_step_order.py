"""Recipes whose steps stand in an order that cannot work."""

from __future__ import annotations

from typing import ClassVar

import pytest

from quantize_runs import refused
from stepquant.methods import STEPS, Step, register_step
from stepquant.methods.recipe import parse_recipe

BASE = {"name": "mine", "description": "for a test"}


@pytest.fixture
def foreign():
    """A step from outside the package."""

    @register_step
    class Foreign(Step):
        name = "foreign"
        needs_ranges = False
        not_after: ClassVar = {"temporal_quantizer": "which it undoes"}
        not_before: ClassVar = {
            "smoothing": "which has rounded",
            "temporal_quantizer": "which undoes it",
        }

    yield Foreign
    del STEPS._entries["foreign"], STEPS._origins["foreign"]


@pytest.mark.parametrize(
    "late",
    [
        "weight_dilation",
        "smoothing",
        "channel_reparameterization",
        "temporal_quantizer",
        "bit_allocation",
    ],
)
def test_a_step_after_one_that_needs_ranges_is_refused_when_the_recipe_is_read(late):
    plain = {"name": "x", "description": "", "steps": ["block_distillation", late]}
    sentence = refused(lambda: parse_recipe(plain, "recipe 'x'"))
    assert f"step '{late}' comes after 'block_distillation', which needs ranges" in sentence


TRAINING = [
    "block_distillation",
    "block_reconstruction",
    "progressive_alignment",
    "trajectory_distillation",
    "relation_distillation",
]
CHOOSING_BITS = ["bit_allocation", "outlier_mixed_bits"]


GRIDS = "which has trained the weights on the grids that it would replace"
FREEZES = "which has trained the weights that it would freeze"
BEGUN = "which has begun its adapters on the grids that it would replace"
UNSEEN = "which has trained the predictions as they are without it"
# (what comes first, what must not come after it, why not)
ORDERS = [
    *((early, "outlier_mixed_bits", GRIDS) for early in TRAINING),
    *((early, "low_rank_adapters", FREEZES) for early in TRAINING),
    ("low_rank_adapters", "outlier_mixed_bits", BEGUN),
    ("trajectory_distillation", "input_error_bypass", UNSEEN),
    ("relation_distillation", "input_error_bypass", UNSEEN),
]


def assert_only_the_other_way_round(early, between, late, why):
    plain = {**BASE, "steps": [early, *between, late]}
    assert refused(lambda: parse_recipe(plain, "recipe 'x'")) == (
        f"recipe 'x': step '{late}' comes after '{early}', {why}: expected it earlier; "
        "exchange the two"
    )
    names = [late, *between, early]
    assert [step.name for step in parse_recipe({**BASE, "steps": names}, "x").steps] == names


@pytest.mark.parametrize("between", [[], ["adaptive_softmax"]], ids=["next", "later"])
@pytest.mark.parametrize(("early", "late", "why"), ORDERS)
def test_a_step_that_would_undo_an_earlier_one_comes_before_it(early, late, why, between):
    assert_only_the_other_way_round(early, between, late, why)


@pytest.mark.parametrize(
    "late", [*TRAINING, "outlier_mixed_bits", "low_rank_adapters", "adaptive_softmax"]
)
def test_bias_is_corrected_after_what_trains_or_changes_grids(late):
    why = "which corrects the errors of all steps before it"
    assert_only_the_other_way_round("bias_correction", [], late, why)


@pytest.mark.parametrize(
    "late", [*TRAINING, "outlier_mixed_bits", "low_rank_adapters", "adaptive_softmax"]
)
def test_biases_are_trained_after_what_trains_or_changes_grids(late):
    why = "which compensates for the errors of all steps before it"
    assert_only_the_other_way_round("affine_distillation", [], late, why)


def test_a_trained_bias_may_still_be_corrected():
    names = ["block_distillation", "affine_distillation", "bias_correction"]
    assert [step.name for step in parse_recipe({**BASE, "steps": names}, "x").steps] == names


def test_nothing_that_changes_a_model_is_taken_after_its_bias_was_corrected():
    for late in STEPS.keys() - {"bias_correction"}:
        plain = {**BASE, "steps": ["bias_correction", late]}
        assert f"step '{late}' comes after 'bias_correction', which " in refused(
            lambda plain=plain: parse_recipe(plain, "x")
        )


@pytest.mark.parametrize("turned", [False, True], ids=["one way", "other way"])
@pytest.mark.parametrize(
    ("pair", "told"),
    [
        (CHOOSING_BITS, "which has chosen the bits that it would replace"),
        (
            ["block_reconstruction", "progressive_alignment"],
            "which has rounded the weights that it would round",
        ),
    ],
    ids=["bits", "rounding"],
)
def test_of_two_steps_with_one_task_only_one_is_taken(pair, told, turned):
    early, late = reversed(pair) if turned else pair
    plain = {**BASE, "steps": [early, "adaptive_softmax", late]}
    assert refused(lambda: parse_recipe(plain, "recipe 'x'")) == (
        f"recipe 'x': step '{late}' comes after '{early}', {told}: expected only one of the two"
    )


@pytest.mark.parametrize("name", sorted(STEPS))
def test_a_step_names_only_steps_that_exist_as_those_it_must_not_follow(name):
    assert STEPS[name].not_after.keys() <= STEPS.keys() - {name}


def test_a_step_may_say_what_must_not_follow_it(foreign):
    """As a step of another package has to: no step of stepquant can name it in `not_after`."""
    told = refused(lambda: parse_recipe({**BASE, "steps": ["foreign", "smoothing"]}, "x"))
    assert told == (
        "x: step 'smoothing' comes after 'foreign', which has rounded: expected it earlier; "
        "exchange the two"
    )
    parse_recipe({**BASE, "steps": ["smoothing", "foreign"]}, "x")
    told = refused(lambda: parse_recipe({**BASE, "steps": ["temporal_quantizer", "foreign"]}, "x"))
    assert told.endswith("which it undoes: expected only one of the two")
