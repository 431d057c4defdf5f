"""Old names of modules that the documentation named, kept for one release."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def keep_old_names(moved: Mapping[str, str]) -> None:
    """Let each old module name import, with a DeprecationWarning that says the new one.

    `moved`: old to new name, both absolute. An old module hands out the attributes of the new one.
    """
    sys.meta_path.append(_MovedModules(moved))


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked last, so that a module that exists under an old name is taken as it is."""

    def __init__(self, moved: Mapping[str, str]) -> None:
        self._moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for a moved module, or None."""
        del path, target
        return ModuleSpec(fullname, self) if fullname in self._moved else None

    def exec_module(self, module: ModuleType) -> None:
        """Point `module` at the new one."""
        old, new = module.__name__, self._moved[module.__name__]
        warnings.warn(
            f"the module {old} is now {new}: import it from there; the old name goes with the next "
            "release",
            DeprecationWarning,
            stacklevel=2,
        )
        found = importlib.import_module(new)
        # PEP 562: the function in the module's dictionary answers for attributes it lacks.
        module.__getattr__ = found.__getattribute__  # type: ignore[method-assign]
