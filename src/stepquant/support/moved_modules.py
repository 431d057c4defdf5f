"""Old names of moved modules, classes and functions, kept for one release."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any


def keep_old_names(moved: Mapping[str, Sequence[str]]) -> None:
    """Keep old module names importable, with a DeprecationWarning that gives the new names.

    `moved` maps old names to new ones, all absolute. An old module has the attributes of all its
    new ones; among equal names, the first module's counts. `python -m OLD` runs the first.
    """
    sys.meta_path.append(_MovedModules(moved))


def old_names(module: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for `module` (PEP 562) that keeps the old names in it importable.

    `moved` maps old names to new ones, `package.module.name`. Each use of an old name gives a
    DeprecationWarning with the new one.
    """

    def attribute(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        new = moved[name]
        warnings.warn(
            f"{module}.{name} is now {new}: import it from there; the old name will be removed in "
            "the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        home, _, new_name = new.rpartition(".")
        return getattr(importlib.import_module(home), new_name)

    return attribute


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Import finder and loader for old names; asked last, so that existing modules win."""

    def __init__(self, moved: Mapping[str, Sequence[str]]) -> None:
        self._moved = moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a moved module, or None for other modules."""
        del path, target
        if fullname not in self._moved:
            return None
        return ModuleSpec(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        """Whether the old module had submodules."""
        return any(name.startswith(f"{fullname}.") for name in self._moved)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return a module that can be called: some old names are functions of the package now."""
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and make `module` return the attributes of the new modules."""
        old, new = module.__name__, self._moved[module.__name__]
        self._warn(old)
        homes = [importlib.import_module(name) for name in new]

        def attribute(name: str) -> Any:
            for home in homes:
                try:
                    return getattr(home, name)
                except AttributeError:
                    continue
            raise AttributeError(f"module '{old}', now {' and '.join(new)}, has no '{name}'")

        # PEP 562: Python calls a module's `__getattr__` for attributes that the module lacks.
        module.__getattr__ = attribute  # type: ignore[method-assign]

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the new module's code, for `python -m`."""
        self._warn(fullname)
        new = self._moved[fullname][0]
        spec = importlib.util.find_spec(new)
        assert spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader)
        return spec.loader.get_code(new)

    def get_source(self, fullname: str) -> str | None:
        """Return None: an old module has no source of its own."""
        del fullname
        return None

    def _warn(self, old: str) -> None:
        new = " and ".join(self._moved[old])
        warnings.warn(
            f"the module {old} is now {new}: import it from there; the old name will be removed in "
            "the next release",
            DeprecationWarning,
            stacklevel=3,
        )


class _OldModule(ModuleType):
    """An old module. Importing `stepquant.bench` puts it in the place of the function `bench`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function that has the module's name."""
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)
