"""How many images a classifier takes for the class that they were asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepquant.evaluation.features import FeatureExtractor, load_features
from stepquant.evaluation.metric import Comparison, register_metric
from stepquant.support.errors import StepQuantError


def class_shares(
    images: Tensor,
    float_images: Tensor,
    classes: Sequence[int],
    features: str | FeatureExtractor,
) -> dict[str, float]:
    """Shares of images that the classifier of `features` assigns to the class they were asked for.

    `classes`: one for each of `images`, and of the float model's. `top1_of_float` is the share of
    `float_images`, `top1_as_float` that of `images` with the class of their float twin. The
    classifier errs too: its card has its accuracy on real images.
    """
    if not len(images) == len(float_images) == len(classes):
        raise StepQuantError(
            f"there are {len(images)} images, {len(float_images)} of the float model and "
            f"{len(classes)} classes: expected as many of each"
        )
    extractor = load_features(features) if isinstance(features, str) else features
    asked = torch.tensor(list(classes))
    ours, theirs = extractor.classes(images), extractor.classes(float_images)
    return {
        "top1": float((ours == asked).double().mean()),
        "top1_of_float": float((theirs == asked).double().mean()),
        "top1_as_float": float((ours == theirs).double().mean()),
    }


@register_metric(
    "class_shares",
    key="top1",
    better="higher",
    of_float="top1_of_float",
    needs=("features", "labels"),
)
def shares(images: Tensor, float_images: Tensor, comparison: Comparison) -> dict[str, float]:
    """`class_shares` by the feature network of the comparison."""
    classes = comparison.labels(len(images))
    assert classes is not None and comparison.features is not None
    return class_shares(images, float_images, classes, comparison.features)
