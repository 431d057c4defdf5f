"""Plug-ins: entry points of installed packages that extend stepquant, loaded by name."""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from stepquant.support.errors import StepQuantError


class PlugIns:
    """The entry points of `group`, each of which adds one thing of a `kind`, such as a step.

    The first look-up reads the metadata of all installed packages. A package is imported only when
    one of its names is loaded, so a broken package does not affect others.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group

    @cached_property
    def entries(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name; several packages may offer the same name."""
        found: dict[str, list[EntryPoint]] = {}
        entries = entry_points(group=self.group)
        for entry in sorted(entries, key=lambda entry: (entry.name, describe(entry))):
            found.setdefault(entry.name, []).append(entry)
        return found

    def package(self, name: str) -> tuple[str, str] | None:
        """Return `(package, version)` of the plug-in that adds `name`, or None."""
        entries = self.entries.get(name)
        dist = entries[0].dist if entries else None
        return None if dist is None else (dist.name, dist.version)

    def load(self, name: str, also_in: str | None = None) -> Any:
        """Import and return the object of the entry point `name`.

        `also_in` is another owner of that name, for the error message; None if there is none.

        Raises:
            StepQuantError: the import fails, or the name has several owners.
        """
        entries = self.entries[name]
        holders = [] if also_in is None else [also_in]
        holders += [f"the package {describe(entry)}" for entry in entries]
        if len(holders) > 1:
            raise StepQuantError(
                f"{self.kind} '{name}' is in {' and in '.join(holders)}: expected one of that "
                "name; uninstall the other"
            )
        try:
            return entries[0].load()
        except Exception as error:
            raise self.broken(name, f"{type(error).__name__}: {error}") from error

    def broken(self, name: str, why: str) -> StepQuantError:
        """Return the error for the plug-in that adds `name` and cannot be used because of `why`."""
        entry = self.entries[name][0]
        return StepQuantError(
            f"{self.kind} '{name}' of the package {describe(entry)} cannot be loaded from "
            f"'{entry.value}' ({' '.join(why.split())}): repair or uninstall that package"
        )


def describe(entry: EntryPoint) -> str:
    """Return name and version of the package that `entry` belongs to, for messages."""
    return f"'{entry.dist.name}' {entry.dist.version}" if entry.dist else "of an unknown name"
