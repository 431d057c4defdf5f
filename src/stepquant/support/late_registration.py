"""Entries in another package's tables, made once that package is imported.

diffusers and transformers find quantizers in dictionaries. Importing both to fill these would cost
every `import stepquant` seconds, so an entry is a stand-in that imports its class when it is used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class LateClass:
    """Stands in for the class `name` of `module`: any use of it imports the class.

    Calling it makes an instance, and its attributes are those of the class.
    """

    def __init__(self, module: str, name: str) -> None:
        object.__setattr__(self, "_place", (module, name))

    def __getattribute__(self, attribute: str) -> Any:
        return getattr(_resolved(self), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance of the class."""
        return _resolved(self)(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        """Whether `instance` is one of the class: `isinstance` asks the stand-in."""
        return isinstance(instance, _resolved(self))


def _resolved(late: LateClass) -> Any:
    module, name = object.__getattribute__(late, "_place")
    return getattr(importlib.import_module(module), name)


def register_late(module: str, entries: Mapping[str, Mapping[str, tuple[str, str]]]) -> None:
    """Add `entries` to the dictionaries of `module`, now or as soon as it is imported.

    `entries`: by the name of the dictionary in `module`, what to add: key to (module, class).
    """

    def add(loaded: ModuleType) -> None:
        for table, added in entries.items():
            getattr(loaded, table).update({key: LateClass(*place) for key, place in added.items()})

    when_imported(module, add)


def when_imported(module: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module called `module`: now if it is loaded, else once it is."""
    if module in sys.modules:
        then(sys.modules[module])
    else:
        sys.meta_path.insert(0, _Watch(module, then))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds no module itself: it adds a call behind the execution of one."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        self._module, self._then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with the call behind it; None for other names."""
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
