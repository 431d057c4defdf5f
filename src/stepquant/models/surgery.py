"""Replacing modules inside a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


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
