"""Integer kernels: their interface (`kernel`), the built-in ones, and the registry of all."""

from stepquant.runtime.kernels import int_mm, native, onednn, reference
from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.kernels.kernel import BoundWeight, Kernel, State, TakesCodes
from stepquant.runtime.kernels.registry import Choice, choose, register_kernel, registered_kernels

__all__ = [
    "Backend",
    "BoundWeight",
    "Choice",
    "Kernel",
    "State",
    "TakesCodes",
    "choose",
    "int_mm",
    "native",
    "onednn",
    "reference",
    "register_kernel",
    "registered_kernels",
]
