"""Registration in another package's dictionaries, delayed until that package is imported.

diffusers and transformers look up quantizers in dictionaries. Importing both to fill these would
add seconds to every `import stepquant`. An entry is therefore a stand-in that imports its class on
first use.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class LateClass:
    """Stand-in for the class `name` of `module`; any use of it imports the class.

    A call creates an instance. Attributes are those of the class.
    """

    def __init__(self, module: str, name: str) -> None:
        object.__setattr__(self, "_place", (module, name))

    def __getattribute__(self, attribute: str) -> Any:
        return getattr(_resolved(self), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a new instance of the class."""
        return _resolved(self)(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, _resolved(self))

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, _resolved(self))


def _resolved(late: LateClass) -> Any:
    module, name = object.__getattribute__(late, "_place")
    return getattr(importlib.import_module(module), name)


def register_late(module: str, entries: Mapping[str, Mapping[str, tuple[str, str]]]) -> None:
    """Add `entries` to the dictionaries of `module`, now or as soon as it is imported.

    `entries` maps the name of each dictionary in `module` to its new items, which map a key to
    `(module, class name)`.
    """

    def add(loaded: ModuleType) -> None:
        for table, added in entries.items():
            getattr(loaded, table).update({key: LateClass(*place) for key, place in added.items()})

    when_imported(module, add)


def when_imported(module: str, then: Callable[[ModuleType], None]) -> None:
    """Call `then` with the module named `module`: now if it is loaded, else right after import."""
    if module in sys.modules:
        then(sys.modules[module])
    else:
        sys.meta_path.insert(0, _Watch(module, then))


class _Watch(importlib.abc.MetaPathFinder):
    """Import finder that leaves finding to the others and adds a call after the module has run.

    It stays in `sys.meta_path`: a module may be looked for without being imported, or be reloaded,
    and removing a finder while another thread walks the list would hide the next finder from it.
    """

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        self._module, self._then = module, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the next finders' spec with the call added; None for modules of other names."""
        if fullname != self._module:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        else:
            return None
        if spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self._then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
