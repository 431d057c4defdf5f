"""A pipeline whose denoiser is known: the one place that takes it out or puts another one in."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from stepquant.models.adapter import DenoiserAdapter
from stepquant.pipelines.sampling import needs_own_scheduler, set_scheduler
from stepquant.support.errors import StepQuantError

DENOISERS = ("unet", "transformer", "denoiser")


@dataclass(frozen=True)
class ResolvedPipeline:
    """A pipeline, and the component of it that predicts the noise.

    `name`: of the component. `adapter`: what its architecture consists of, where that was asked
    for (`calibration.survey.adapter_of`). Whatever is changed comes in a copy of the pipeline,
    which shares all other components.
    """

    pipeline: DiffusionPipeline
    name: str
    denoiser: nn.Module
    adapter: DenoiserAdapter | None = None

    @classmethod
    def of(cls, pipeline: DiffusionPipeline) -> ResolvedPipeline:
        """`pipeline` with its denoiser; StepQuantError where it has none."""
        found = cls.find(pipeline)
        if found is not None:
            return found
        raise StepQuantError(
            f"{type(pipeline).__name__} has the components {sorted(pipeline.components)}: expected "
            f"a denoiser called {', '.join(DENOISERS[:-1])} or {DENOISERS[-1]}"
        )

    @classmethod
    def find(cls, pipeline: DiffusionPipeline) -> ResolvedPipeline | None:
        """As `of`, or None."""
        for name in DENOISERS:
            denoiser = getattr(pipeline, name, None)
            if isinstance(denoiser, nn.Module):
                return cls(pipeline, name, denoiser)
        return None

    def other_denoisers(self) -> list[str]:
        """Names of the components that predict noise beside this one."""
        parts = self.pipeline.components.items()
        kinds = {name: type(part).__name__ for name, part in parts if isinstance(part, nn.Module)}
        return other_denoisers(self.name, kinds)

    @property
    def kind(self) -> str:
        """The name of the pipeline's class."""
        return type(self.pipeline).__name__

    def with_denoiser(self, denoiser: nn.Module) -> ResolvedPipeline:
        """With another denoiser in its place."""
        other = copy.copy(self.pipeline)
        # Not through the pipeline, which would note the class in what `save_pretrained` writes.
        vars(other)[self.name] = denoiser
        return replace(self, pipeline=other, denoiser=denoiser)

    def uncompiled(self) -> ResolvedPipeline:
        """With the denoiser as it was before `torch.compile`, if it is compiled as a whole."""
        inner = getattr(self.denoiser, "_orig_mod", None)
        if isinstance(inner, nn.Module):  # torch.compile(model)
            return self.with_denoiser(inner)
        if getattr(self.denoiser, "_compiled_call_impl", None) is not None:  # model.compile()
            return self.with_denoiser(copy.copy(self.denoiser))  # copies are not compiled
        return self

    def with_scheduler(self, name: str | None) -> ResolvedPipeline:
        """With the scheduler `name`, or a copy of its own; see `sampling.set_scheduler`."""
        other = copy.copy(self.pipeline)
        set_scheduler(other, name)
        return replace(self, pipeline=other)

    def scheduler(self, steps: int) -> Any:
        """A copy of the pipeline's scheduler, set to `steps` steps."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        # Timesteps of flow matching may depend on the size of the image.
        if not needs_own_scheduler(self.pipeline):
            scheduler.set_timesteps(steps)
        return scheduler


def denoiser_of(pipeline: DiffusionPipeline) -> nn.Module:
    """The module that predicts the noise."""
    return ResolvedPipeline.of(pipeline).denoiser


def other_denoisers(denoiser: str, kinds: Mapping[str, str]) -> list[str]:
    """Names of the components that predict noise beside `denoiser`, such as `transformer_2`.

    `kinds`: the name of each component's class. A denoiser beside the first has its class, or its
    name and a number.
    """
    same = kinds.get(denoiser)
    return [
        name
        for name, kind in kinds.items()
        if name != denoiser and (kind == same or name.removeprefix(f"{denoiser}_").isdecimal())
    ]
