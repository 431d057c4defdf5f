"""PSNR and SSIM of pairs of images that two models drew from the same seeds."""

from __future__ import annotations

from torch import Tensor

from stepquant.evaluation.extra import evaluate_extra
from stepquant.evaluation.features import check_unit_range
from stepquant.evaluation.metric import Comparison, register_metric
from stepquant.support.errors import StepQuantError

PSNR_CEILING = 100.0  # dB: a root mean square error of 1e-5, far below half a step of 8 bits
SSIM_WINDOW = 11  # pixels, the side of the Gaussian window of Wang et al. 2004
CHUNK = 500  # images per pass; bounds the memory of SSIM


def _check_pair(images_a: Tensor, images_b: Tensor, smallest: int) -> None:
    """Require equal shapes `[N, C, H, W]`, values in [0, 1], and H and W of `smallest` or more."""
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
    """Peak signal-to-noise ratio in dB, averaged over pairs, with a data range of 1.

    The PSNR of a pair is -10 log10(mean squared error over C, H, W). The result is the mean over
    pairs, not the PSNR of the pooled error. Each pair is capped at 100 dB (`PSNR_CEILING`), an
    error too small for 8-bit images to show, so identical pairs, whose ratio is infinite, keep the
    mean finite. A mean of exactly 100.0 says that every pair is that close.

    Args:
        images_a: floating point `[N, C, H, W]` in [0, 1], of one model.
        images_b: the same, of the other model from the same seeds. The order does not matter.

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
    """Structural similarity averaged over pairs, with a data range of 1; identical pairs give 1.

    Wang et al. 2004: an 11 x 11 Gaussian window of standard deviation 1.5, k1 = 0.01, k2 = 0.03,
    averaged over channels and all pixels. Torchmetrics mirrors an image at its edges. Other
    packages leave out the outer five pixels, which changes the second decimal on small images.

    Args:
        images_a: floating point `[N, C, H, W]` in [0, 1], H and W of 11 or more.
        images_b: the same, of the other model from the same seeds. The order does not matter.

    Raises:
        StepQuantError: as in `paired_psnr`, or images smaller than the window.
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
        assert isinstance(similarity, Tensor)  # a tuple only with return_full_image
        total += float(similarity.double().sum())
    return total / len(images_a)


@register_metric("paired_psnr", key="paired_psnr_db", column="psnr_db", better="higher")
def psnr(images: Tensor, float_images: Tensor, comparison: Comparison) -> dict[str, float]:
    """The metric `paired_psnr` against the float model's images."""
    return {"paired_psnr_db": paired_psnr(float_images, images)}


@register_metric("paired_ssim", key="paired_ssim", better="higher")
def ssim(images: Tensor, float_images: Tensor, comparison: Comparison) -> dict[str, float]:
    """The metric `paired_ssim` against the float model's images."""
    return {"paired_ssim": paired_ssim(float_images, images)}
