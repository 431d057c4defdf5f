from __future__ import annotations

import pytest

from stepquant.conditioning import Conditioning
from stepquant.errors import StepQuantError


class Plain:
    def __call__(self, batch_size, generator, output_type):
        """Draws without conditions."""


class Model:
    def __init__(self, **config):
        self.config = config


class OfClasses:
    def __init__(self, classes=7):
        self.transformer = Model(num_embeds_ada_norm=classes)

    def __call__(self, class_labels, guidance_scale=4.0, generator=None):
        """Draws images of classes."""


class OfTexts:
    def __call__(self, prompt, height=None, guidance_scale=7.5):
        """Draws images of texts."""


def test_an_unconditional_pipeline_gets_a_count():
    assert Conditioning().arguments(Plain(), 4, 3) == {"batch_size": 3}


def test_prompts_go_round_by_the_number_of_the_image():
    found = Conditioning.of(prompts=["a", "b", "c"], guidance=2.0, call={"height": 8})
    assert found.arguments(OfTexts(), 4, 3) == {
        "prompt": ["b", "c", "a"],
        "guidance_scale": 2.0,
        "height": 8,
    }


def test_one_prompt_or_label_needs_no_list():
    assert Conditioning.of(prompts="a cat").arguments(OfTexts(), 0, 2)["prompt"] == ["a cat"] * 2
    assert Conditioning.of(labels=3).arguments(OfClasses(), 0, 2)["class_labels"] == [3, 3]


def test_without_labels_all_classes_are_drawn_before_one_comes_again():
    found = Conditioning().arguments(OfClasses(), 0, 14)["class_labels"]
    assert sorted(found[:7]) == list(range(7))
    assert found[:7] == found[7:] != sorted(found[:7])


@pytest.mark.parametrize(
    ("conditioning", "pipeline", "message"),
    [
        ({}, OfTexts(), "OfTexts draws images of prompts and got none"),
        ({"prompts": "x"}, OfClasses(), "OfClasses takes no prompts"),
        ({"labels": 1}, OfTexts(), "OfTexts takes no class labels"),
        ({"labels": [1, 7]}, OfClasses(), "class label is 7: expected 0 to 6"),
        ({"labels": -1}, OfClasses(), "class label is -1"),
        ({}, OfClasses(None), "does not say how many it has"),
        ({"guidance": 3.0}, Plain(), "Plain takes no 'guidance_scale'"),
        ({"prompts": "x", "call": {"hight": 8}}, OfTexts(), "OfTexts takes no 'hight'"),
    ],
)
def test_what_a_pipeline_does_not_take_is_told(conditioning, pipeline, message):
    with pytest.raises(StepQuantError, match=message):
        Conditioning.of(**conditioning).check(pipeline)


def test_a_record_tells_prompts_apart_without_holding_them():
    one, other = (Conditioning.of(prompts=[text]).describe() for text in ("a", "b"))
    assert one["prompts"] == other["prompts"] == 1
    assert one["prompts_sha256"] != other["prompts_sha256"]
    assert Conditioning().describe() == {}
    assert Conditioning.of(labels=[2], guidance=1.5).describe() == {"labels": [2], "guidance": 1.5}
