"""How an error of the prediction at a sampling step changes the image in the end.

With the sampler's step `x' = f(ε(x, t), x)` and `a'` the gradient of something of the image by
`x'`, `a = (∂x'/∂x)ᵀ a'` is its gradient by `x`, and `v = (∂f/∂ε)ᵀ a'` that by the prediction. One
sweep from the image back to the noise so gives the gradients by the predictions of all steps. From
random signs at the image, `(v · e)²` is, in the mean, the squared change of the image by an error
`e`.
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

NEIGHBOURS = 2  # steps on either side that a step's spectrum is averaged with
MIXED = (
    "the sampler mixes several predictions of an image at each step, which the influence "
    "of a step is not followed through"
)


def check_without_memory(scheduler: Any) -> None:
    """An error unless a step of `scheduler` depends on its own input only (DDIM, DDPM)."""
    reason = _why_memory(scheduler)
    if reason is not None:
        raise StepQuantError(
            f"{reason}: expected calibration.scheduler ddim or ddpm, or an influence_exponent of 0 "
            "and errors_of: prediction"
        )


def check_unguided(trajectories: Trajectories) -> None:
    """An error where the sampler mixes several predictions of an image at a step."""
    reason = _why_guided(trajectories)
    if reason is not None:
        raise StepQuantError(
            f"{reason}: expected no classifier-free guidance; calibrate with guidance 1, or use an "
            "influence_exponent of 0 and errors_of: prediction"
        )


def why_not_followed(scheduler: Any, trajectories: Trajectories) -> str | None:
    """Why the influence of a step on the image cannot be followed here.

    None where it can; with guidance and DDIM that takes the weights of the mix besides.
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
    """`v` of each step for the first `images` of `trajectories`, `[T, images, C, H, W]`.

    `scheduler`: set to the steps of `trajectories`; one whose step depends on its own input only
    (DDIM, DDPM), else StepQuantError. The gradients are of a sum of the image's values with random
    signs, an independent one for each value. With guidance they are by the mix of an image's
    predictions with the weights `mixing [kinds]` (`calibration.guidance`); StepQuantError without.
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
                # Behind the noise a model may predict its variance, which the sampler leaves out.
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
    """What an error counts, by step and spatial frequency, `[T, H, W]`, from `image_gradients`.

    The mean over images, channels, frequencies within an octave and neighbouring steps of
    `|F v|²`, with the unitary transform `F`. In the layout of `torch.fft.fft2`. Taking `F` to make
    the errors' parts independent, `sum over f of spectrum[t, f] |F e|²[f]` is the squared change of
    the image by an error `e` of the prediction at step `t`.
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
    """Mean over the values of `error [B, C, H, W]` of its power, weighted by `spectrum`, `[B]`.

    `spectrum [B, H, W]` has the layout of `torch.fft.fft2`. All ones give the mean square.
    """
    parts = torch.view_as_real(torch.fft.fft2(error, norm="ortho"))
    return (parts.square().sum(dim=-1) * spectrum[:, None]).flatten(1).mean(dim=1)


def shared_power(error: Tensor, spectrum: Tensor, together: int) -> Tensor:
    """Mean power of what each `together` neighbours of `error [B, C, H, W]` have in common.

    Each frequency of each error is weighted by the root of `spectrum [B, H, W]` (the layout of
    `torch.fft.fft2`), then the mean over the neighbours is taken and squared. With one neighbour
    it is the mean of `weighted_power`.
    """
    parts = torch.fft.fft2(error, norm="ortho") * spectrum[:, None].sqrt()
    shared = torch.view_as_real(parts.unflatten(0, (-1, together)).mean(dim=1))
    return shared.square().sum(dim=-1).mean()
