"""A module that takes a denoiser's calls and otherwise behaves like the denoiser."""

from __future__ import annotations

import weakref
from functools import wraps
from typing import Any

from torch import nn

from stepquant.models.calling import argument_names


def original(module: nn.Module) -> nn.Module:
    """Return the denoiser behind `module`, or `module` itself if it is not a stand-in."""
    return original(module.denoiser) if isinstance(module, StandIn) else module


class StandIn(nn.Module):
    """Base class with the attributes and the signature of `denoiser`.

    Calls go to `_call(args, kwargs)`, which subclasses implement.
    """

    denoiser: nn.Module

    def __init__(self, denoiser: nn.Module) -> None:
        """Wrap `denoiser`, which is not changed."""
        super().__init__()
        self.denoiser, self._names = denoiser, argument_names(denoiser)
        self._take_calls()

    def _take_calls(self) -> None:
        me = weakref.ref(self)  # no reference cycle: the last reference frees the memory

        @wraps(self.denoiser.forward)  # keeps the signature, which pipelines inspect
        def forward(*args: Any, **kwargs: Any) -> Any:
            found = me()
            assert found is not None
            return found._call(args, kwargs)

        self.forward = forward

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a call's arguments by name, without positional arguments that have no name."""
        return dict(zip(self._names, args, strict=False)) | kwargs

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "denoiser":
                raise
            return getattr(super().__getattr__("denoiser"), name)

    def __getstate__(self) -> dict[str, Any]:
        # `forward` is bound to this module; a copy needs one of its own.
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_calls()
