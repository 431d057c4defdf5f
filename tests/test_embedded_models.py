"""The embedded models that have conditions, whose weights are trained and not random."""

import pytest
import torch

from stepquant.api import load, quantize, sample
from stepquant.evaluation import load_features, paired_psnr
from stepquant.pipelines.opening import builtin_names, default_conditions, default_features

MODELS = [
    f"builtin:{name}" for name in builtin_names() if default_conditions(f"builtin:{name}").classes
]
CLASSES = 10


def arguments(model):
    conditioning = default_conditions(model).conditioning
    return {
        "prompts": conditioning.prompts,
        "labels": conditioning.labels,
        "guidance": conditioning.guidance,
    }


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def images(model):
    return sample(model, 2 * CLASSES, 15, **arguments(model))


def test_each_condition_has_a_class_and_all_classes_come_first(model):
    conditions = default_conditions(model)
    given = conditions.conditioning.prompts or conditions.conditioning.labels
    assert len(conditions.classes) == len(given)
    assert sorted(conditions.classes[:CLASSES]) == list(range(CLASSES))
    conditions.conditioning.check(load(model))


def test_images_are_of_the_classes_that_were_asked_for(model, images):
    found = load_features(default_features(model)).classes(images)
    asked = torch.tensor(default_conditions(model).classes_of(len(images)))
    assert float((found == asked).double().mean()) >= 0.7


def test_a_packed_model_draws_what_the_float_one_draws(model, images, tmp_path):
    settings = {"calibration.trajectories": 4}
    given = arguments(model)
    quantize(model, "minmax", 8, 8, tmp_path / "packed", 15, settings, **given)
    packed = sample(tmp_path / "packed", CLASSES, 15, **given)
    assert 18 < paired_psnr(images[:CLASSES], packed) < 100


@pytest.mark.skipif("builtin:fashion-dit" not in MODELS, reason="fashion-dit is not shipped")
def test_labels_of_the_dit_name_a_class_by_their_remainder():
    one, other = (
        sample("builtin:fashion-dit", 1, 2, labels=[label], guidance=2.0) for label in (3, 993)
    )
    assert torch.equal(one, other)
