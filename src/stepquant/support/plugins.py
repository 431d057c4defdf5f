"""What installed packages add to stepquant: the entry points of one group, loaded by name."""

from __future__ import annotations

from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from stepquant.support.errors import StepQuantError


class PlugIns:
    """Entry points of `group`, each of which adds one `kind` of thing, such as a step, by its name.

    The first look-up reads the metadata of all installed packages. A package is imported when one
    of its names is loaded, so a broken one is in nobody's way.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group

    @cached_property
    def entries(self) -> dict[str, list[EntryPoint]]:
        """The entry points by name: one for each package that offers it."""
        found: dict[str, list[EntryPoint]] = {}
        entries = entry_points(group=self.group)
        for entry in sorted(entries, key=lambda entry: (entry.name, describe(entry))):
            found.setdefault(entry.name, []).append(entry)
        return found

    def package(self, name: str) -> tuple[str, str] | None:
        """`(package, version)` of the plug-in that adds `name`, or None."""
        entries = self.entries.get(name)
        dist = entries[0].dist if entries else None
        return None if dist is None else (dist.name, dist.version)

    def load(self, name: str, also_in: str | None = None) -> Any:
        """Import what the entry point `name` refers to.

        `also_in`: who has a thing of that name already.

        Raises:
            StepQuantError: the import fails, or several packages have that name.
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
        """The error of the plug-in that adds `name` and cannot be used."""
        entry = self.entries[name][0]
        return StepQuantError(
            f"{self.kind} '{name}' of the package {describe(entry)} cannot be loaded from "
            f"'{entry.value}' ({' '.join(why.split())}): repair or uninstall that package"
        )


def describe(entry: EntryPoint) -> str:
    """Name and version of the package that `entry` belongs to."""
    return f"'{entry.dist.name}' {entry.dist.version}" if entry.dist else "of an unknown name"
