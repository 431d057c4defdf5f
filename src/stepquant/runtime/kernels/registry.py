"""The registry of kernels, and the choice of a layer's kernel."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from stepquant.runtime.kernels.backend import Backend
from stepquant.runtime.kernels.kernel import Kernel
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.support.errors import StepQuantError
from stepquant.support.plugins import PlugIns
from stepquant.support.refusal import Refusal

K = TypeVar("K", bound=Kernel)


class _Registered(NamedTuple):
    kernel: Kernel
    priority: int


_REGISTERED: dict[str, _Registered] = {}
PLUG_INS = PlugIns("kernel", "stepquant.kernels")


def register_kernel(*, priority: int) -> Callable[[type[K]], type[K]]:
    """Class decorator: makes a kernel available to integer layers and its name to users.

    Args:
        priority: The backend `auto` tries kernels in descending order of priority. The built-in
            kernels have 300 (native), 200 (onednn), 100 (int_mm) and 0 (reference, which runs
            every layer).

    Raises:
        StepQuantError: The name belongs to another kernel, or to a backend that is not a kernel.
    """

    def register(kind: type[K]) -> type[K]:
        name = kind.name
        known = _REGISTERED.get(name)
        if name in (Backend.AUTO, "fastest") or name.partition(":")[0] == "openvino":
            raise StepQuantError(
                f"a kernel is called '{name}': expected another name, because this one is "
                "a backend without a kernel"
            )
        if known is not None and type(known.kernel) is not kind:
            raise StepQuantError(
                f"there are two kernels called '{name}', {type(known.kernel).__qualname__} and "
                f"{kind.__qualname__}: expected different names"
            )
        _REGISTERED[name] = _Registered(kind(), priority)
        return kind

    return register


def registered_kernels(device_type: str | None = None) -> dict[str, Kernel]:
    """The registered kernels by name, in order of preference.

    Installed packages add kernels through the entry-point group `stepquant.kernels`.

    `device_type`: return only kernels for this type ("cpu", "cuda") or for all devices; None: all.
    """
    _import_plug_ins()
    # Sorting is stable: of two kernels with equal priority, the one registered first wins.
    ordered = sorted(_REGISTERED.items(), key=lambda item: -item[1].priority)
    return {
        name: registered.kernel
        for name, registered in ordered
        if device_type is None or device_type in (registered.kernel.device_types or (device_type,))
    }


@functools.cache
def _import_plug_ins() -> None:
    """Import the packages that add kernels, once; warn about those that fail to import."""
    for name in PLUG_INS.entries:
        try:
            PLUG_INS.load(name)
        except StepQuantError as error:
            # Only a warning, because `auto` can use the next kernel.
            warnings.warn(str(error), stacklevel=2)


def kernel_of(kind: type[K]) -> K:
    """The registered kernel of the class `kind`."""
    kernel = _REGISTERED[kind.name].kernel
    assert isinstance(kernel, kind)
    return kernel


class Choice(NamedTuple):
    """The kernel chosen for a layer."""

    kernel: Kernel
    refusals: dict[str, Refusal]
    """By kernel name: why preferred kernels cannot run the layer."""

    @property
    def reasons(self) -> list[str]:
        """The refusals as text, each with the kernel's name."""
        return [f"{name}: {refusal}" for name, refusal in self.refusals.items()]


def choose(spec: LayerSpec, device: torch.device, backend: str = Backend.AUTO) -> Choice:
    """Choose the kernel of a layer on `device`.

    `backend` is "auto", for the first kernel in order of preference that supports the layer, or the
    name of a kernel. If the named kernel refuses the layer, the fallback is the reference kernel,
    and the choice holds the refusal.

    Raises StepQuantError if no kernel is called `backend`.
    """
    kernels = registered_kernels()
    if backend != Backend.AUTO:
        if backend not in kernels:
            raise StepQuantError(
                f"unknown backend '{backend}': expected auto or one of {', '.join(kernels)}"
            )
        kernel = kernels[backend]
        refusal = kernel.why_not(spec, device)
        if refusal is None:
            return Choice(kernel, {})
        return Choice(kernels[Backend.REFERENCE], {kernel.name: refusal})
    refusals: dict[str, Refusal] = {}
    for name, kernel in kernels.items():
        refusal = kernel.why_not(spec, device)
        if refusal is None:
            return Choice(kernel, refusals)
        refusals[name] = refusal
    raise AssertionError("the reference kernel takes every layer")
