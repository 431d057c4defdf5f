"""Registries of named steps, adapters and metrics, which other packages can extend."""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from stepquant.support.errors import StepQuantError
from stepquant.support.plugins import PlugIns

Entry = TypeVar("Entry")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A mapping from names to all available entries of one kind, such as steps.

    An entry registers itself when its module is imported. The first look-up imports every module
    of the package `home`, so a new file there needs no list. Installed packages add entries through
    the entry-point group `group`. The entry point's name is that of the entry; its value is the
    module that registers the entry. Plug-ins are listed without being imported, after all others.

    Args:
        kind: noun for an entry in errors, such as "step".
        group: entry-point group, such as "stepquant.steps".
        home: package with the modules of stepquant's own entries, such as "stepquant.methods".
        in_order: list entries in order of registration, not by name. This order is reproducible
            only if importing `home` itself imports its modules.
    """

    def __init__(self, kind: str, group: str, home: str, in_order: bool = False) -> None:
        self.kind = kind
        self.home = home
        self.in_order = in_order
        self.plug_ins = PlugIns(kind, group)
        self._entries: dict[str, Entry] = {}
        self._origins: dict[str, tuple[str, str]] = {}  # module and qualified name
        self._home_imported = False
        self._importing = False
        self._lock = threading.RLock()

    def register(self, name: str, entry: Entry, origin: Any) -> None:
        """Add `entry` under `name`; `origin` is the class or function that defines it.

        The same definition may register again, as a notebook cell does when it runs again.

        Raises:
            StepQuantError: another definition has that name.
        """
        place = (str(origin.__module__), origin.__qualname__)
        if not place[0].startswith(f"{self.home}."):
            self._import_home()
        taken = self._origins.get(name, place)
        if taken != place:
            raise StepQuantError(
                f"{self.kind} '{name}' of {'.'.join(place)} has the name of {'.'.join(taken)}: "
                "expected an unused name; choose another"
            )
        self._entries[name] = entry
        self._origins[name] = place

    def find(self, name: str) -> Entry:
        """Return the entry `name`.

        Raises:
            StepQuantError: there is no such entry, or the package that adds it is broken.
        """
        if name not in self:
            raise StepQuantError(
                f"unknown {self.kind} '{name}': expected one of {', '.join(self)}; a {self.kind} "
                "of another package needs that package installed"
            )
        return self[name]

    def package(self, name: str) -> tuple[str, str] | None:
        """Return `(package, version)` of the plug-in that adds `name`; None for stepquant's own."""
        return self.plug_ins.package(name)

    def __getitem__(self, name: str) -> Entry:
        self._import_home()
        if name in self.plug_ins.entries:
            self._import_plug_in(name)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def __iter__(self) -> Iterator[str]:
        self._import_home()
        own = self._entries if self.in_order else sorted(self._entries)
        yield from dict.fromkeys((*own, *self.plug_ins.entries))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _import_home(self) -> None:
        """Import every module of `home`, once."""
        if self._home_imported:
            return
        with self._lock:
            if self._home_imported or self._importing:
                return
            self._importing = True
            try:
                for module in pkgutil.iter_modules(importlib.import_module(self.home).__path__):
                    importlib.import_module(f"{self.home}.{module.name}")
                self._home_imported = True
            finally:
                self._importing = False

    def _import_plug_in(self, name: str) -> None:
        """Import the package that adds `name`, which then registers the entry.

        Raises:
            StepQuantError: the import fails, or the package does not register `name`.
        """
        (module, _) = self._origins.get(name, ("", ""))
        own = module.startswith(f"{self.home}.")
        self.plug_ins.load(name, "stepquant" if own else None)
        if name not in self._entries:
            raise self.plug_ins.broken(name, f"it registers no {self.kind} of that name")
