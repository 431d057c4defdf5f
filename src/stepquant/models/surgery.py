"""Replacement of modules inside a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from torch import nn


def copy_around(model: nn.Module, modules: Iterable[nn.Module]) -> nn.Module:
    """Return a deep copy of `model` that shares the tensors of `modules` with the original.

    Use it when `modules` will be replaced in the copy: in a large model they hold nearly all
    tensors. Tensors that they share with other modules are copied.
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
    """Replace each submodule for which `replacement(name, module)` is not None.

    The function changes `model` in place and returns it. It does not visit the children of a
    replaced module. If a module has several names, `replacement` sees it once, and the result goes
    to all of them.
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
    """Return the names of the submodules of `kinds` that are not inside another one."""
    found: list[str] = []
    for name, module in model.named_modules():  # parents come before their children
        inside = any(name.startswith(f"{parent}.") for parent in found)
        if name and not inside and isinstance(module, kinds):
            found.append(name)
    return found
