"""A pipeline around any denoiser module, for denoisers that are not from diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor, nn

from stepquant.models.calling import call_denoiser
from stepquant.support.errors import StepQuantError

# (denoiser, noise [B, C, H, W], steps, a generator for each image) -> images [B, C, H, W] in [0, 1]
DrawImages = Callable[[nn.Module, Tensor, int, list[torch.Generator]], Tensor]


class OwnSampler(SchedulerMixin, ConfigMixin):
    """Placeholder for the scheduler if the user's own function samples."""

    owns_sampling = True

    @register_to_config
    def __init__(self) -> None:
        """Take no settings."""


class DenoiserPipeline(DiffusionPipeline):
    """A pipeline around any module whose `forward` takes a sample and a `timestep`.

    All of stepquant accepts it in place of a diffusers pipeline, with one difference: only the
    quantized denoiser is saved, not the pipeline. `load_module` loads it into a module that the
    user builds again.

    Args:
        denoiser: module that predicts, for `sample [B, C, H, W]` and `timestep [B]`.
        shape: shape of one sample, `(C, H, W)`.
        scheduler: a diffusers scheduler. The default is DDIM on a linear schedule of 1000 steps,
            without clipping.
        draw: function with a sampler of its own, in place of a scheduler. It is called as
            `draw(denoiser, noise, steps, generators)` with `noise [B, C, H, W]` and one generator
            for each image, and returns images `[B, C, H, W]` in [0, 1]. It may call `denoiser` any
            number of times, with further arguments.
        blocks: shell-style patterns of block names; see `models.general`.
        float_layers: shell-style patterns of the layers that stay float; see `models.general`.

    Raises:
        StepQuantError: `shape` is not `(C, H, W)`, or both `scheduler` and `draw` are given.
    """

    scales_input = True  # each step calls the scheduler's `scale_model_input`
    saves_denoiser_only = True

    def __init__(
        self,
        denoiser: nn.Module,
        shape: Sequence[int],
        scheduler: Any = None,
        draw: DrawImages | None = None,
        blocks: Sequence[str] = (),
        float_layers: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if len(shape) != 3 or min(shape) < 1:
            raise StepQuantError(
                f"the shape of a sample is {tuple(shape)}: expected (channels, height, width)"
            )
        if scheduler is not None and draw is not None:
            raise StepQuantError(
                "a scheduler and a function draw were given: expected one of the two; leave one out"
            )
        if scheduler is None:
            scheduler = DDIMScheduler(clip_sample=False) if draw is None else OwnSampler()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.shape, self.draw = tuple(shape), draw
        self.patterns = (tuple(blocks), tuple(float_layers))

    @property
    def components(self) -> dict[str, Any]:
        """Denoiser and scheduler; diffusers would count the other arguments as components, too."""
        return {"denoiser": self.denoiser, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int,
        generator: list[torch.Generator],
        num_inference_steps: int = 50,
        output_type: str = "np",
    ) -> ImagePipelineOutput:
        """Sample images `[B, H, W, C]`, float32 in [0, 1], each from the noise of its generator.

        `output_type` is ignored: the images are always arrays.

        Raises:
            StepQuantError: the user's function does not return images `[B, C, H, W]`.
        """
        del output_type
        noise = torch.cat([torch.randn(1, *self.shape, generator=one) for one in generator])
        noise = noise.to(next(self.denoiser.parameters(), noise).device)
        draw = self.draw or self._walk
        images = draw(self.denoiser, noise, num_inference_steps, generator)
        if not isinstance(images, Tensor) or images.shape[0] != batch_size or images.dim() != 4:
            what = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise StepQuantError(
                f"the function draw returned {what}: expected images [{batch_size}, C, H, W]"
            )
        return ImagePipelineOutput(images=images.float().cpu().permute(0, 2, 3, 1).numpy())

    def _walk(
        self, denoiser: nn.Module, x: Tensor, steps: int, generators: list[torch.Generator]
    ) -> Tensor:
        """Sample images `[B, C, H, W]` in [0, 1] with the scheduler, from the noise `x`."""
        scheduler = self.scheduler
        scheduler.set_timesteps(steps)
        # As in diffusers' pipelines: not all schedulers draw noise, scale noise or scale the input.
        draws = "generator" in inspect.signature(scheduler.step).parameters
        more: dict[str, Any] = {"generator": generators} if draws else {}
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        for t in scheduler.timesteps:
            scales = hasattr(scheduler, "scale_model_input")
            scaled = scheduler.scale_model_input(x, t) if scales else x
            prediction = call_denoiser(denoiser, scaled, t.expand(len(x)))
            x = scheduler.step(prediction, t, x, **more).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)
