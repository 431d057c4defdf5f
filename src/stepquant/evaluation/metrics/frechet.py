"""Fréchet distance between the features of two sets of images (Heusel et al. 2017)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stepquant.evaluation.feature_network import frechet_metric
from stepquant.evaluation.features import FeatureExtractor, load_features
from stepquant.evaluation.metric import Comparison, register_metric
from stepquant.evaluation.reference_statistics import COUNT, check_statistics
from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

    Reference = Tensor | Mapping[str, Tensor]


def _checked_features(features: Tensor, what: str) -> Tensor:
    """`features` as float64 `[N, D]` on the CPU; errors call them `what`."""
    if features.ndim != 2 or not features.is_floating_point():
        raise StepQuantError(
            f"{what} are {features.dtype} of shape {list(features.shape)}: expected floating "
            "point [N, D], one row per image"
        )
    count, width = features.shape
    if count < 2 or width < 1:
        raise StepQuantError(
            f"{what} have shape {list(features.shape)}: expected at least two rows, which a "
            "covariance needs; generate more images"
        )
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite()).any(1).sum())
        raise StepQuantError(
            f"{what} have values that are not finite in {bad} of {count} rows: expected finite "
            "features; look for NaN in the images"
        )
    _warn_if_few(count, width, what)
    return features.detach().cpu().double()


def _warn_if_few(count: int, width: int, what: str) -> None:
    """Warn if the covariance cannot have full rank, which inflates the distance."""
    if count <= width:
        warnings.warn(
            f"{what} are {count} samples of {width} features: the Fréchet distance is biased "
            "upwards and only comparable at this same number of samples",
            stacklevel=4,
        )


def _metric_with(reference: Reference, num_features: int) -> FrechetInceptionDistance:
    """Torchmetrics' distance with `reference` as its real side."""
    metric = frechet_metric(num_features)
    if isinstance(reference, Tensor):
        real = _checked_features(reference, "reference features")
        if real.shape[1] != num_features:
            raise StepQuantError(
                f"reference features have length {real.shape[1]}: expected {num_features}, the "
                "length of the features; extract both with the same network"
            )
        metric.update(real, real=True)
        return metric
    state = check_statistics(reference, num_features)
    _warn_if_few(int(state[COUNT]), num_features, "the reference statistics")
    metric.load_state_dict(state, strict=False)
    return metric


def _distance(metric: FrechetInceptionDistance, features: Tensor) -> float:
    """The distance from `features` (float64) to the real side of `metric`."""
    metric.reset()  # keeps the real side
    metric.update(features, real=False)
    # Rounding in the eigenvalues can leave an exact zero some 1e-12 below it.
    return max(0.0, float(metric.compute()))


def frechet_distance(features: Tensor, reference: Reference) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), with unbiased covariances, in float64, by
    torchmetrics (Heusel et al. 2017, equation 6, who use Inception features). Records name the
    distance after its features, as in `fd_fashion`. Compare distances only over the same features,
    the same reference and the same number of samples: the bias is upwards, about proportional to
    1/N, and large unless N is well above D.

    Args:
        features: `[N, D]` floating point, of the generated images, N of two or more.
        reference: features `[M, D]` of the other set, or its stored statistics, such as
            `FeatureExtractor.reference`.

    Returns:
        The distance, zero or more.

    Raises:
        StepQuantError: wrong shapes, values that are not finite, fewer than two samples, or
            torchmetrics is not installed.

    Warns:
        UserWarning: a set has no more samples than features.
    """
    checked = _checked_features(features, "features")
    return _distance(_metric_with(reference, checked.shape[1]), checked)


def frechet_distance_interval(
    features: Tensor,
    reference: Reference,
    resamples: int = 50,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval of `frechet_distance` over the choice of the generated images.

    The reference stays fixed, and the N rows of `features` are resampled with replacement. A
    resample adds its own finite-sample bias to that of the N images, so the resampled distances lie
    *above* the point estimate d, and their plain percentiles would often miss d. The interval
    therefore uses only their spread, reflected about d (the basic or pivotal bootstrap, centered on
    the median m of the resampled distances instead of d):

        (d - (q_upper - m), d + (m - q_lower)), clipped at zero,

    where q_lower and q_upper are the percentiles at (1 -+ level) / 2. The interval always contains
    d. It says how far the distance *at this N* would move with other images of the same model. It
    does not remove the upward bias of a finite N, so compare models at the same N. It does not
    cover the spread over training or calibration seeds.

    Args:
        features: `[N, D]`, as for `frechet_distance`.
        reference: as for `frechet_distance`.
        resamples: number of resamples, ten or more; each costs one `frechet_distance`. The ends of
            the interval are noisy if there are few: 50 give a rough 95 % interval, 1000 a fine one.
        seed: seed of the resampling; the same seed gives the same interval.
        level: nominal coverage of the interval, between 0 and 1.

    Returns:
        (low, high), with 0 <= low <= d <= high.

    Raises:
        StepQuantError: as in `frechet_distance`, or `resamples` or `level` is out of range.
    """
    if resamples < 10:
        raise StepQuantError(f"resamples is {resamples}: expected ten or more for an interval")
    if not 0 < level < 1:
        raise StepQuantError(f"level is {level}: expected a share between 0 and 1, such as 0.95")
    checked = _checked_features(features, "features")
    count = len(checked)
    metric = _metric_with(reference, checked.shape[1])
    point = _distance(metric, checked)
    generator = torch.Generator().manual_seed(seed)
    draws = [
        _distance(metric, checked[torch.randint(count, (count,), generator=generator)])
        for _ in range(resamples)
    ]
    tails = torch.tensor([(1 - level) / 2, 0.5, (1 + level) / 2], dtype=torch.float64)
    lower, middle, upper = torch.quantile(torch.tensor(draws, dtype=torch.float64), tails).tolist()
    return max(0.0, point - (upper - middle)), point + (middle - lower)


def distances(
    images: Tensor, float_images: Tensor, features: str | FeatureExtractor
) -> dict[str, Any]:
    """Fréchet distances of `images` to the training data and to the float model's images.

    Args:
        images: `[N, C, 32, 32]` in [0, 1], of the candidate.
        float_images: the same, of the float model from the same seeds.
        features: a feature network, or the name of a shipped one.

    Returns:
        For features called NAME: `fd_NAME_to_float`; if the network has reference statistics also
        `fd_NAME` (to the training data), `fd_NAME_of_float` (the float model's own distance to
        them) and `fd_NAME_ratio` of the two. Keys that end in `_interval` hold 95 % bootstrap
        intervals.
    """
    extractor = load_features(features) if isinstance(features, str) else features
    name = f"fd_{extractor.name}"
    theirs, ours = extractor(float_images), extractor(images)
    record: dict[str, Any] = {
        "features": extractor.name,
        f"{name}_to_float": frechet_distance(ours, theirs),
        f"{name}_to_float_interval": list(frechet_distance_interval(ours, theirs)),
    }
    if extractor.reference is not None:
        record[name] = frechet_distance(ours, extractor.reference)
        record[f"{name}_interval"] = list(frechet_distance_interval(ours, extractor.reference))
        record[f"{name}_of_float"] = frechet_distance(theirs, extractor.reference)
        record[f"{name}_ratio"] = record[name] / record[f"{name}_of_float"]
    return record


@register_metric(
    "frechet_distance",
    key="fd_{features}",
    better="lower",
    of_float="fd_{features}_of_float",
    needs=("features",),
)
def to_data_and_float(
    images: Tensor, float_images: Tensor, comparison: Comparison
) -> dict[str, Any]:
    """The metric `frechet_distance`: `distances` over the comparison's features."""
    assert comparison.features is not None
    return distances(images, float_images, comparison.features)
