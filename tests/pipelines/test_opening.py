import json

import pytest

from stepquant.pipelines import opening
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import (
    EmbeddedConditions,
    builtin_names,
    default_conditions,
    default_features,
)


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """Makes `builtin:tiny` a folder with these conditions."""

    def make(conditions):
        (tmp_path / "conditions.json").write_text(json.dumps(conditions))
        monkeypatch.setattr(
            opening, "builtin_path", lambda name: tmp_path / name.replace("tiny", "")
        )
        return "builtin:tiny"

    return make


def test_prompts_of_an_embedded_model(embedded):
    prompts = {"guidance": 2.5, "classes": [0, 1, 0], "prompts": ["a bag", "a coat", "bag"]}
    found = default_conditions(embedded(prompts))
    assert found.conditioning == Conditioning(("a bag", "a coat", "bag"), (), 2.5)
    assert found.classes == (0, 1, 0)


def test_labels_of_an_embedded_model(embedded):
    found = default_conditions(embedded({"guidance": 2, "classes": [0, 1], "labels": [0, 1]}))
    assert found.conditioning == Conditioning((), (0, 1), 2)


def test_classes_follow_one_another_over_and_over_again():
    assert EmbeddedConditions(classes=(4, 7)).classes_of(5) == (4, 7, 4, 7, 4)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param("builtin:fashion-ddpm", id="unconditional"),
        pytest.param("fashion-t2i", id="a folder of that name"),
        pytest.param(None, id="a pipeline"),
    ],
)
def test_other_models_have_no_conditions(model):
    assert default_conditions(model) == EmbeddedConditions()


@pytest.mark.parametrize("name", builtin_names())
def test_each_embedded_model_has_features(name):
    assert default_features(f"builtin:{name}") == name.partition("-")[0]


def test_a_folder_that_is_called_as_an_embedded_model_has_no_features():
    assert default_features("fashion-dit") is None
