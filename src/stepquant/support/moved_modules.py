"""Old names of moved modules that the documentation mentioned, kept for one release."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def keep_old_names(moved: Mapping[str, str]) -> None:
    """Keep old module names importable, with a DeprecationWarning that gives the new name.

    `moved` maps old to new names, both absolute. An old module has the attributes of the new one.
    """
    sys.meta_path.append(_MovedModules(moved))


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import finder and loader for old names; asked last, so that existing modules win."""

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a moved module, or None for other modules."""
        del path, target
        return ModuleSpec(fullname, self) if fullname in self._moved else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and make `module` return the attributes of the new module."""
        old, new = module.__name__, self._moved[module.__name__]
        warnings.warn(
            f"the module {old} is now {new}: import it from there; the old name will be removed in "
            "the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        found = importlib.import_module(new)
        # PEP 562: Python calls a module's `__getattr__` for attributes that the module lacks.
        module.__getattr__ = found.__getattribute__  # type: ignore[method-assign]
