"""Parsed backend names: a kernel for the layers, or an engine for the whole denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from stepquant.runtime.kernels.backend import Backend


class Engine(str, Enum):
    """The engine that runs a quantized denoiser's calls."""

    LAYERS = "layers"
    """The denoiser itself; `Target.kernel` names the kernel of its layers."""
    OPENVINO = "openvino"
    FASTEST = "fastest"
    """The faster of OpenVINO and the layers on this machine."""


@dataclass(frozen=True)
class Target:
    """A parsed backend."""

    engine: Engine
    kernel: str = Backend.AUTO.value
    """Kernel of the layers; "auto" chooses the best one for each."""
    device: str | None = None
    """OpenVINO's name of the device; None for other engines."""

    @classmethod
    def parse(cls, backend: str) -> Target:
        """Parse `openvino`, `openvino:DEVICE`, `fastest`, or the name of a kernel as in `Backend`.

        The default device of `openvino` is the CPU. Any other name is taken for a kernel's, which
        `kernels.choose` checks later.
        """
        backend = str(backend)
        name, _, device = backend.partition(":")
        if name == Engine.OPENVINO:
            return cls(Engine.OPENVINO, device=device or "CPU")
        if backend == Engine.FASTEST:
            return cls(Engine.FASTEST)
        return cls(Engine.LAYERS, kernel=backend)
