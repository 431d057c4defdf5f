"""Replacing modules inside a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def replace_modules(
    model: nn.Module, replacement: Callable[[str, nn.Module], nn.Module | None]
) -> nn.Module:
    """Put `replacement(name, module)` in the place of each module for which it is not None.

    Changes `model` in place and returns it. A replaced module's children are not visited.
    """
    for name, module in list(model.named_modules()):
        if not name:
            continue
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
        except AttributeError:
            continue  # below a module that was replaced
        if parent._modules.get(child) is not module:
            continue
        new = replacement(name, module)
        if new is not None:
            setattr(parent, child, new)
    return model
