"""What a backend's name stands for: a kernel for the layers, or an engine for the denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from stepquant.runtime.kernels.backend import Backend


class Engine(str, Enum):
    """What takes a quantized denoiser's calls."""

    LAYERS = "layers"
    """The denoiser itself; `Target.kernel` says what its layers run on."""
    OPENVINO = "openvino"
    FASTEST = "fastest"
    """OpenVINO or the layers, whichever is faster here."""


@dataclass(frozen=True)
class Target:
    """A parsed backend."""

    engine: Engine
    kernel: str = Backend.AUTO.value
    """The kernel that layers run on where they run; "auto": the best one."""
    device: str | None = None
    """OpenVINO's name of a device; None for other engines."""

    @classmethod
    def parse(cls, backend: str) -> Target:
        """Read `openvino`, `openvino:DEVICE`, `fastest`, or a kernel's name as in `Backend`.

        `openvino` alone is for the CPU. Any other name counts as a kernel's: the registry knows
        which ones there are (`kernels.choose`).
        """
        backend = str(backend)
        name, _, device = backend.partition(":")
        if name == Engine.OPENVINO:
            return cls(Engine.OPENVINO, device=device or "CPU")
        if backend == Engine.FASTEST:
            return cls(Engine.FASTEST)
        return cls(Engine.LAYERS, kernel=backend)
