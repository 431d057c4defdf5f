"""A module in a denoiser's place, which takes its calls and is the denoiser otherwise."""

from __future__ import annotations

import weakref
from functools import wraps
from typing import Any

from torch import nn

from stepquant.models.calling import argument_names


def original(module: nn.Module) -> nn.Module:
    """What `module` stands in for, or itself."""
    return original(module.denoiser) if isinstance(module, StandIn) else module


class StandIn(nn.Module):
    """Has the attributes and the signature of `denoiser`, and calls `_call` in its place."""

    denoiser: nn.Module

    def __init__(self, denoiser: nn.Module) -> None:
        """`denoiser` stays as it is."""
        super().__init__()
        self.denoiser, self._names = denoiser, argument_names(denoiser)
        self._take_calls()

    def _take_calls(self) -> None:
        me = weakref.ref(self)  # so that its memory goes with the last reference to it

        @wraps(self.denoiser.forward)  # with its signature, which pipelines look at
        def forward(*args: Any, **kwargs: Any) -> Any:
            found = me()
            assert found is not None
            return found._call(args, kwargs)

        self.forward = forward

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by their names; those beyond the named ones are left out."""
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
