"""Influence of a prediction error at each sampling step on the final image.

The sampler's step is `x' = f(ε(x, t), x)`. Let `a'` be the gradient of a function of the image with
respect to `x'`. Then `a = (∂x'/∂x)ᵀ a'` is its gradient with respect to `x`, and `v = (∂f/∂ε)ᵀ a'`
that with respect to the prediction. One sweep from the image back to the noise gives `v` for all
steps. If the sweep starts from random signs at the image, the mean of `(v · e)²` is the squared
change of the image by an error `e` of the prediction.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from stepquant.calibration.guidance import mixed
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

NEIGHBOURS = 2  # steps on each side that a step's spectrum is averaged with
MIXED = (
    "the sampler mixes several predictions of an image at each step, which the influence "
    "of a step is not followed through"
)


def check_without_memory(scheduler: Any) -> None:
    """Check that a step of `scheduler` depends on its own input only.

    Raises:
        StepQuantError: `scheduler` is neither DDIM nor DDPM, or is DDPM with a learned variance.
    """
    reason = _why_memory(scheduler)
    if reason is not None:
        raise StepQuantError(
            f"{reason}: expected calibration.scheduler ddim or ddpm, or an influence_exponent of 0 "
            "and errors_of: prediction"
        )


def check_unguided(trajectories: Trajectories) -> None:
    """Check that the sampler uses one prediction of an image at each step.

    Raises:
        StepQuantError: the sampler mixes several predictions, as with classifier-free guidance.
    """
    reason = _why_guided(trajectories)
    if reason is not None:
        raise StepQuantError(
            f"{reason}: expected no classifier-free guidance; calibrate with guidance 1, or use an "
            "influence_exponent of 0 and errors_of: prediction"
        )


def why_not_followed(scheduler: Any, trajectories: Trajectories) -> str | None:
    """Return why the influence of a step on the image cannot be computed, or None if it can.

    DDIM with guidance also needs the weights of the mix; see `calibration.guidance`.
    """
    reason = _why_memory(scheduler)
    if reason is None and not isinstance(scheduler, DDIMScheduler):
        reason = _why_guided(trajectories)
    return reason


def _why_memory(scheduler: Any) -> str | None:
    name = type(scheduler).__name__
    if isinstance(scheduler, DDPMScheduler) and scheduler.variance_type.startswith("learned"):
        name += " with a variance that the model predicts"
    elif isinstance(scheduler, DDIMScheduler | DDPMScheduler):
        return None
    return (
        "the influence of a step on the image is followed through DDIM and DDPM only, not "
        f"through {name}"
    )


def _why_guided(trajectories: Trajectories) -> str | None:
    return MIXED if trajectories.guided else None


def image_gradients(
    model: nn.Module,
    scheduler: Any,
    trajectories: Trajectories,
    images: int,
    seed: int,
    reporter: Reporter,
    mixing: Tensor | None = None,
) -> Tensor:
    """Return the gradient `v` at each step, for the first `images` of `trajectories`.

    The result is `[T, images, C, H, W]`. The differentiated function is the sum of the image's
    values, each with an independent random sign drawn from `seed`. With guidance, the gradients are
    those with respect to the mix of an image's predictions.

    Args:
        model: denoiser that predicts in float.
        scheduler: DDIM or DDPM, set to the steps of `trajectories`.
        trajectories: inputs of the denoiser at every step.
        images: number of images.
        seed: seed of the signs.
        reporter: shows progress.
        mixing: weights `[kinds]` of the mix, see `calibration.guidance`; None without guidance.

    Raises:
        StepQuantError: a step of `scheduler` does not depend on its own input only, `trajectories`
            are guided and `mixing` is None, or the gradients are zero or not finite.
    """
    check_without_memory(scheduler)
    if mixing is None:
        check_unguided(trajectories)
        mixing = torch.ones(1)
    kinds = len(mixing)
    steps = len(trajectories.timesteps)
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    gradient: Tensor | None = None
    with reporter.task("following steps back from the image", total=steps) as task:
        for row in reversed(range(steps)):
            inputs = trajectories.step(row, images)
            x = inputs.sample[::kinds].clone().requires_grad_()
            timestep = trajectories.timesteps[row].long()
            with torch.enable_grad():
                seen = x if kinds == 1 else x.repeat_interleave(kinds, dim=0)
                prediction = mixed(predict(model, replace(inputs, sample=seen)), mixing)
                # Channels after those of the noise are a predicted variance, which is not used.
                after = scheduler.step(prediction[:, : x.shape[1]], timestep, x).prev_sample
            if gradient is None:
                gradient = torch.randint(0, 2, after.shape, generator=generator) * 2.0 - 1.0
            v, gradient = torch.autograd.grad(after, (prediction, x), gradient)
            found.append(v)
            task.advance()
    result = torch.stack(found[::-1])
    if not torch.isfinite(result).all() or not result.flatten(1).any(dim=1).all():
        raise StepQuantError(
            "the image's gradients by the predictions are zero, NaN or infinity: expected finite "
            "numbers; check the scheduler and the float model"
        )
    return result


def influence_spectrum(gradients: Tensor) -> Tensor:
    """Return the weight of a prediction error by step and spatial frequency, `[T, H, W]`, float32.

    `gradients [T, images, C, H, W]` are those of `image_gradients`. The spectrum is `|F v|²` with
    the unitary Fourier transform `F`, averaged over images, channels, frequencies within an octave,
    and neighbouring steps. Frequencies have the layout of `torch.fft.fft2`.

    If the components of `F e` are independent, `sum over f of spectrum[t, f] |F e|²[f]` is the
    squared change of the image by an error `e` of the prediction at step `t`.
    """
    power = torch.fft.fft2(gradients.double(), norm="ortho").abs().square().mean(dim=(1, 2))
    height, width = power.shape[1:]
    vertical, horizontal = torch.fft.fftfreq(height) * height, torch.fft.fftfreq(width) * width
    radius = (vertical[:, None].square() + horizontal[None].square()).sqrt()
    octave = torch.where(radius < 1, 0, radius.clamp(min=1).log2().floor() + 1)
    result = torch.empty_like(power)
    for number in octave.unique():
        members = octave == number
        mean = power[:, members].mean(dim=1)  # [T]
        padded = torch.nn.functional.pad(mean[None], (NEIGHBOURS, NEIGHBOURS), "replicate")[0]
        smooth = padded.unfold(0, 2 * NEIGHBOURS + 1, 1).mean(dim=1)
        result[:, members] = smooth[:, None]
    return result.float()


def weighted_power(error: Tensor, spectrum: Tensor) -> Tensor:
    """Return the mean power of `error [B, C, H, W]`, weighted by `spectrum [B, H, W]`, as `[B]`.

    `spectrum` has the layout of `torch.fft.fft2`. A spectrum of ones gives the mean square.
    """
    parts = torch.view_as_real(torch.fft.fft2(error, norm="ortho"))
    return (parts.square().sum(dim=-1) * spectrum[:, None]).flatten(1).mean(dim=1)


def shared_power(error: Tensor, spectrum: Tensor, together: int) -> Tensor:
    """Return the mean power of the common part in each group of `together` errors, as a scalar.

    `error` is `[B, C, H, W]`; `together` must divide `B`. Each frequency of each error is weighted
    by the square root of `spectrum [B, H, W]`, in the layout of `torch.fft.fft2`. The common part
    is the mean over each group of adjacent errors. With `together = 1` the result is the mean of
    `weighted_power`.
    """
    parts = torch.fft.fft2(error, norm="ortho") * spectrum[:, None].sqrt()
    shared = torch.view_as_real(parts.unflatten(0, (-1, together)).mean(dim=1))
    return shared.square().sum(dim=-1).mean()
