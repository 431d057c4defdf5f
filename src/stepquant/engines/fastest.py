"""A packed denoiser on the faster of the packed kernels and OpenVINO."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stepquant.engines.captured_calls import recorded
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser, description

TIMED_CALLS = 3
LOGGER = logging.getLogger(__name__)


class FastestDenoiser(OpenVinoDenoiser):
    """Times both engines at the first call of each shape, and keeps the faster one.

    The engines differ by float32 rounding between integer sums, and the choice depends on the
    machine and its load. Results are bit-identical only for equal `choices`, so name a backend if
    they have to be reproducible. The first call includes OpenVINO's compilation.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        """Prepare both engines; arguments and errors are those of `OpenVinoDenoiser`."""
        super().__init__(denoiser)
        # Not a submodule, because its parameters are those of `denoiser`.
        self.__dict__["packed"] = recorded(denoiser)
        self.choices: dict[str, str] = {}  # by the shapes of a call: "packed" or "openvino"

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ways: dict[str, Callable[[], Any]] = {
            "packed": lambda: self.packed(*args, **kwargs),
            "openvino": lambda: super(FastestDenoiser, self)._call(args, kwargs),
        }
        arguments = self._by_name(args, kwargs)
        arguments["timestep"] = torch.as_tensor(arguments.get("timestep", 0))
        shapes = description(arguments)
        if shapes not in self.choices:
            seconds = {name: seconds_of(way) for name, way in ways.items()}
            self.choices[shapes] = min(seconds, key=lambda name: seconds[name])
            LOGGER.warning(
                "%s runs on %s from now on: packed kernels take %.1f ms a call here, OpenVINO %.1f",
                type(self.denoiser).__name__,
                self.choices[shapes],
                seconds["packed"] * 1e3,
                seconds["openvino"] * 1e3,
            )
        return ways[self.choices[shapes]]()


@torch.no_grad()
def seconds_of(way: Callable[[], object]) -> float:
    """Return the shortest time of a few calls in seconds, after a warm-up call."""
    way()
    found = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        way()
        found.append(time.perf_counter() - start)
    return min(found)
