"""Capture of a denoiser's arguments, call by call."""

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
    """Raised by a hook that has one call's arguments, to end sampling there."""


class InputCapture:
    """Keeps the inputs of every call of a denoiser; for use as `before` of `models.hooks.hooked`.

    `samples` and `timesteps` hold one tensor for each call, `[B, ...]` and `[B]` (on the CPU).
    `conditions` collects the other arguments.
    """

    def __init__(self, denoiser: nn.Module, by_sample: Collection[str] | None = None) -> None:
        """Prepare for calls of `denoiser`.

        `by_sample` is the argument of `ConditionRecorder`.

        Raises:
            StepQuantError: `denoiser.forward` has no argument `timestep`, or takes `*args`.
        """
        timestep_position(denoiser)  # raises if there is no such argument
        self._signature = inspect.signature(denoiser.forward)
        self._sample = argument_names(denoiser)[0]
        kinds = {name: p.kind for name, p in self._signature.parameters.items()}
        for name, kind in kinds.items():
            if kind is inspect.Parameter.VAR_POSITIONAL:
                raise StepQuantError(
                    f"{type(denoiser).__name__}.forward takes '*{name}': expected named arguments, "
                    "because calibration passes them again by name; wrap the model in a module "
                    "whose forward names each argument"
                )
        self._open = [n for n, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD]
        self.samples: list[Tensor] = []
        self.timesteps: list[Tensor] = []
        self.conditions = ConditionRecorder(type(denoiser).__name__, by_sample)

    def __call__(self, _: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the arguments of one call, except `return_dict` and None where it is the default."""
        arguments = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        for name in self._open:  # `**kwargs`, whatever its name
            arguments |= arguments.pop(name, {})
        sample, given = arguments.pop(self._sample), arguments.pop("timestep")
        timestep = torch.as_tensor(given)  # a number, [] or [B]
        count = sample.shape[0]
        self.samples.append(sample.detach().clone())
        self.timesteps.append(
            timestep.reshape(-1).expand(count).cpu().clone()
        )  # on the CPU, where steps are counted
        arguments.pop("return_dict", None)
        self.conditions.add(
            {name: value for name, value in arguments.items() if not self._is_default(name, value)},
            count,
        )

    def _is_default(self, name: str, value: Any) -> bool:
        parameter = self._signature.parameters.get(name)
        return value is None and parameter is not None and parameter.default is None
