"""What a denoiser is called with, kept call by call."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.conditions import ConditionRecorder
from stepquant.models.calling import argument_names
from stepquant.quantizers.step_grid import timestep_position
from stepquant.support.errors import StepQuantError


class Seen(Exception):
    """Raised by a hook once one call's arguments are known; the rest is not needed."""


class Recorder:
    """Keeps the inputs of every call of a denoiser; a `before` of `models.hooks.hooked`."""

    def __init__(self, denoiser: nn.Module, by_sample: Collection[str] | None = None) -> None:
        """`by_sample`: see `ConditionRecorder`."""
        timestep_position(denoiser)  # an error where there is no such argument
        self._signature = inspect.signature(denoiser.forward)
        self._sample = argument_names(denoiser)[0]
        kinds = {name: p.kind for name, p in self._signature.parameters.items()}
        for name, kind in kinds.items():
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise StepQuantError(
                    f"{type(denoiser).__name__}.forward takes '*{name}': expected arguments with "
                    "names, by which they are given again; wrap the model so that each has one"
                )
        self._open = [n for n, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]
        self.samples: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.conditions = ConditionRecorder(type(denoiser).__name__, by_sample)

    def __call__(self, _: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of one call."""
        arguments = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name in self._open:  # of `**cond`, whatever it is called
            arguments |= arguments.pop(name, {})
        sample, given = arguments.pop(self._sample), arguments.pop("timestep")
        timestep = torch.as_tensor(given)  # a number, [] or [B]
        count = sample.shape[0]
        self.samples.append(sample.detach().clone())
        self.timesteps.append(
            timestep.reshape(-1).expand(count).cpu().clone()
        )  # it is counted with
        arguments.pop("return_dict", None)
        self.conditions.add(
            {name: value for name, value in arguments.items() if not self._is_default(name, value)},
            count,
        )

    def _is_default(self, name: str, value: Any) -> bool:
        parameter = self._signature.parameters.get(name)
        return value is None and parameter is not None and parameter.default is None
