"""Classification accuracy: the share of images that show the requested class."""

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
    """Top-1 accuracy of generated images under the classifier of a feature network.

    The classifier errs too: the network's model card gives its accuracy on real images.

    Args:
        images: `[N, C, 32, 32]` in [0, 1], of the candidate.
        float_images: the same, of the float model from the same seeds.
        classes: N class numbers that both models were asked for.
        features: a feature network, or the name of a shipped one.

    Returns:
        Shares in [0, 1]: `top1` of `images` and `top1_of_float` of `float_images` that the
        classifier assigns to the requested class, and `top1_as_float` of `images` that it assigns
        to the same class as the float model's image.

    Raises:
        StepQuantError: the numbers of images and classes differ, or the network does not take the
            images.
    """
    if not len(images) == len(float_images) == len(classes):
        raise StepQuantError(
            f"there are {len(images)} images, {len(float_images)} of the float model and "
            f"{len(classes)} classes: expected equal numbers"
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
    """The metric `class_shares`, with the classifier of the comparison's feature network."""
    classes = comparison.labels(len(images))
    assert classes is not None and comparison.features is not None
    return class_shares(images, float_images, classes, comparison.features)
