"""Distances between image sets and between paired images and outputs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from stepquant.evaluation.extra import evaluate_extra
from stepquant.evaluation.feature_network import frechet_metric
from stepquant.evaluation.features import check_unit_range
from stepquant.evaluation.reference_statistics import COUNT, check_statistics
from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:
    from torchmetrics.image.fid import FrechetInceptionDistance

    Reference = Tensor | Mapping[str, Tensor]

PSNR_CEILING = 100.0  # dB; a root mean square error of 1e-5, far below half a step of 8 bits
SSIM_WINDOW = 11  # pixels, the side of the Gaussian window of Wang et al. 2004
CHUNK = 500  # images a pass, which bounds the memory that SSIM needs


class StepError(TypedDict):
    """One row of `noise_prediction_error`."""

    timestep: int | float
    relative_mse: float


def _checked_features(features: Tensor, what: str) -> Tensor:
    """`features` as float64 `[N, D]` on the CPU, or a StepQuantError that names `what`."""
    if features.ndim != 2 or not features.is_floating_point():
        raise StepQuantError(
            f"{what} are {features.dtype} of shape {list(features.shape)}: expected floating "
            "point [N, D], one row per image"
        )
    count, width = features.shape
    if count < 2 or width < 1:
        raise StepQuantError(
            f"{what} have shape {list(features.shape)}: expected two rows or more, as a "
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
    """Warn where the covariance cannot have full rank, which inflates the distance."""
    if count <= width:
        warnings.warn(
            f"{what} are {count} samples of {width} features: the Fréchet distance is biased "
            "upwards and only comparable at this same number of samples",
            stacklevel=4,
        )


def _metric_with(reference: Reference, num_features: int) -> FrechetInceptionDistance:
    """Torchmetrics' distance with its real side filled from `reference`."""
    metric = frechet_metric(num_features)
    if isinstance(reference, Tensor):
        real = _checked_features(reference, "reference features")
        if real.shape[1] != num_features:
            raise StepQuantError(
                f"reference features have length {real.shape[1]}: expected {num_features} as the "
                "features have; extract both with the same network"
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
    torchmetrics (Heusel et al. 2017, equation 6, there on Inception features). It is named after
    the features, `fd_fashion` say, and is comparable only over the same features, the same
    reference and the same number of samples: it is biased upwards by about 1/N, and strongly
    when N is not well above D.

    Args:
        features: `[N, D]` floating point, of the generated images, N of two or more.
        reference: features `[M, D]` of the other set, or stored statistics of it, such as
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
    """Bootstrap interval of `frechet_distance` over the draw of the generated images.

    The reference stays fixed and the N rows of `features` are drawn again with replacement. Such
    a resample has its own finite-sample bias on top of the one that N images have, so its
    distances lie *above* the point estimate d and their plain percentiles would often miss d
    altogether. Therefore only their spread is used, reflected about d (the basic or pivotal
    bootstrap, with the median m of the resampled distances in the place of d as their centre):

        (d - (q_upper - m), d + (m - q_lower)), cut at zero,

    where q_lower and q_upper are the percentiles at (1 -+ level) / 2. The interval always holds d.
    It says how far the distance *at this N* would move with other images of the same model; it
    does not remove the bias towards larger distances that any finite N has, so compare models at
    the same N. It says nothing of the spread over training or calibration seeds.

    Args:
        features: `[N, D]`, as for `frechet_distance`.
        reference: as for `frechet_distance`.
        resamples: number of resamples, ten or more; each costs one `frechet_distance`. With few,
            the ends themselves are noisy: 50 give a rough 95 % interval, 1000 a fine one.
        seed: seed of the resampling; the same seed gives the same interval.
        level: share of draws that the interval should hold, between 0 and 1.

    Returns:
        (low, high), with 0 <= low <= d <= high.

    Raises:
        StepQuantError: as `frechet_distance`, or `resamples` or `level` is out of range.
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


def _check_pair(images_a: Tensor, images_b: Tensor, smallest: int) -> None:
    """Raise a StepQuantError unless both are `[N, C, H, W]` in [0, 1], H and W `smallest` or up."""
    for name, images in (("images_a", images_a), ("images_b", images_b)):
        shape = list(images.shape)
        if images.ndim != 4 or 0 in shape or min(shape[2:]) < smallest:
            raise StepQuantError(
                f"{name} have shape {shape}: expected [N, C, H, W] with H and W of {smallest} or "
                "more"
            )
        check_unit_range(images, name)
    if images_a.shape != images_b.shape:
        raise StepQuantError(
            f"images_a have shape {list(images_a.shape)} and images_b {list(images_b.shape)}: "
            "expected pairs of one shape; sample both models with the same seeds"
        )


def paired_psnr(images_a: Tensor, images_b: Tensor) -> float:
    """Mean over pairs of the peak signal-to-noise ratio, in dB, with a data range of 1.

    PSNR = -10 log10(mean squared error over C, H, W), per pair, then averaged over the pairs: not
    the PSNR of the pooled error. A pair counts at most 100 dB (`PSNR_CEILING`), an error that no
    8-bit image can show; so identical pairs, whose ratio is infinite, count 100 dB, the mean stays
    finite and comparable, and a mean of exactly 100.0 says that every pair is that close.

    Args:
        images_a: floating point `[N, C, H, W]` in [0, 1], of the float model.
        images_b: the same, of the other model at the same seeds. The order does not matter.

    Raises:
        StepQuantError: wrong or different shapes, a dtype that is not floating point, values that
            are not finite or not in [0, 1], or torchmetrics is not installed.
    """
    with evaluate_extra():
        from torchmetrics.functional.image import peak_signal_noise_ratio
    _check_pair(images_a, images_b, 1)
    ratios = peak_signal_noise_ratio(
        images_a.detach().cpu().double(),
        images_b.detach().cpu().double(),
        data_range=1.0,
        reduction="none",
        dim=(1, 2, 3),
    )  # [N]
    return float(ratios.clamp(max=PSNR_CEILING).mean())


def paired_ssim(images_a: Tensor, images_b: Tensor) -> float:
    """Mean over pairs of the structural similarity, at most 1 (identical), data range 1.

    Wang et al. 2004: 11 x 11 Gaussian window of standard deviation 1.5, k1 = 0.01, k2 = 0.03,
    averaged over channels and all pixels; beyond its edges an image is mirrored (torchmetrics'
    choice: other packages leave the outer five pixels out, and differ in the second decimal on
    images as small as these).

    Args:
        images_a: floating point `[N, C, H, W]` in [0, 1], H and W of 11 or more.
        images_b: the same, of the other model at the same seeds. The order does not matter.

    Raises:
        StepQuantError: as `paired_psnr`, or images smaller than the window.
    """
    with evaluate_extra():
        from torchmetrics.functional.image import structural_similarity_index_measure
    _check_pair(images_a, images_b, SSIM_WINDOW)
    total = 0.0
    for a, b in zip(images_a.split(CHUNK), images_b.split(CHUNK), strict=True):
        similarity = structural_similarity_index_measure(
            a.detach().cpu().float(),
            b.detach().cpu().float(),
            data_range=1.0,
            kernel_size=SSIM_WINDOW,
            reduction="none",
        )
        assert isinstance(similarity, Tensor)  # a pair only when the full image is asked for
        total += float(similarity.double().sum())
    return total / len(images_a)


def noise_prediction_error(
    float_outputs: Sequence[Tensor] | Tensor,
    quantized_outputs: Sequence[Tensor] | Tensor,
    timesteps: Sequence[float] | Tensor,
) -> list[StepError]:
    """Mean squared error of the denoiser's output at each step, over the float mean square.

    Both models must have been given the same inputs, those of the float trajectory, or the errors
    of earlier steps are counted again.

    Args:
        float_outputs: T tensors of the float model's output, each `[N, ...]`, or one `[T, N, ...]`.
        quantized_outputs: the same of the quantized model.
        timesteps: the T timesteps that they belong to.

    Returns:
        T rows {"timestep": number, "relative_mse": float}, in the order given: 0 is equal, 1 is as
        wrong as an output of zeros.

    Raises:
        StepQuantError: lengths or shapes differ, values are not finite, or a float output is zero
            throughout; the sentence names the timestep.
    """
    # Those of flow matching are not whole.
    steps = [int(step) if float(step).is_integer() else float(step) for step in timesteps]
    if not len(float_outputs) == len(quantized_outputs) == len(steps) > 0:
        raise StepQuantError(
            f"there are {len(float_outputs)} float outputs, {len(quantized_outputs)} quantized "
            f"outputs and {len(steps)} timesteps: expected one of each per step, one step or more"
        )
    rows: list[StepError] = []
    for step, wanted, found in zip(steps, float_outputs, quantized_outputs, strict=True):
        if wanted.shape != found.shape or wanted.numel() == 0:
            raise StepQuantError(
                f"the quantized output at timestep {step} has shape {list(found.shape)}: expected "
                f"that of the float output, {list(wanted.shape)}, and not empty"
            )
        want = wanted.detach().cpu().double()
        error = float((found.detach().cpu().double() - want).square().mean())
        power = float(want.square().mean())
        relative = error / power if power > 0 else float("nan")
        if not 0 <= relative < float("inf"):
            raise StepQuantError(
                f"the outputs at timestep {step} have a mean squared error of {error} and a float "
                f"mean square of {power}: expected finite values and a float output above zero"
            )
        rows.append({"timestep": step, "relative_mse": relative})
    return rows
