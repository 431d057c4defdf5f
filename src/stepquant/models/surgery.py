"""Replacing modules inside a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import nn


def copy_around(model: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """A deep copy of `model` in which the tensors of `modules` are not copied but those of `model`.

    For `modules` that are to be replaced in the copy: of a large model they are nearly everything.
    What they share with other modules is copied.
    """
    own = {inner for module in modules for inner in module.modules()}
    others = {
        id(tensor)
        for module in model.modules()
        if module not in own
        for tensor in (*module._parameters.values(), *module._buffers.values())
    }
    tensors = [t for m in own for t in (*m._parameters.values(), *m._buffers.values())]
    shared = {id(tensor): tensor for tensor in tensors if id(tensor) not in others}
    return copy.deepcopy(model, shared)


def replace_modules(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Put `replacement(name, module)` in the place of each module for which it is not None.

    Changes `model` in place and returns it. A replaced module's children are not visited. A module
    that stands in several places is asked about once and replaced in all of them.
    """
    _replace_children(model, "", replacement, {model: model})
    return model


def _replace_children(
    parent: nn.Module,
    prefix: str,
    replacement: Callable[[str, nn.Module], nn.Module | None],
    seen: dict[nn.Module, nn.Module],
) -> None:
    for child, module in list(parent._modules.items()):
        if module is None:
            continue
        if module not in seen:
            new = replacement(prefix + child, module)
            seen[module] = module if new is None else new
            if new is None:
                _replace_children(module, f"{prefix}{child}.", replacement, seen)
        if seen[module] is not module:
            setattr(parent, child, seen[module])


def outermost_modules(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Names of the modules of `kinds` that lie in no other such module."""
    found: list[str] = []
    for name, module in model.named_modules():  # parents come before their children
        inside = any(name.startswith(f"{parent}.") for parent in found)
        if name and not inside and isinstance(module, kinds):
            found.append(name)
    return found
