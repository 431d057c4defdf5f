"""The denoiser's arguments other than sample and timestep, stored for many inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from stepquant.models.calling import tensors_in
from stepquant.support.errors import StepQuantError

SEPARATOR = "."  # between the names of nested arguments
# Before the index of an entry. Denoisers may pop the entries of a list, so it stays a list.
MARKS: dict[str, type[tuple[Any, ...]] | type[list[Any]]] = {"#": tuple, "@": list}


@dataclass(frozen=True)
class Conditions:
    """Further arguments of `N` denoiser inputs: prompt embeddings, labels, masks, guidance.

    - `values`: by argument name, its distinct values `[U, ...]`. An embedding that is the same at
      all steps is stored once.
    - `rows`: by argument name, the index of each input's value, `[N]` (int64).
    - `shared`: tensors without a row for each input, the same for all inputs.
    - `constants`: values that are not tensors.

    Names of nested arguments are joined by dots, such as `added_cond_kwargs.time_ids`. Entries of
    tuples have an index, such as `image_rotary_emb.#0`, and those of lists one such as `@0`.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    @property
    def differ(self) -> bool:
        """Whether some argument has more than one distinct value."""
        return any(len(value) > 1 for value in self.values.values())

    def take(self, index: Tensor | slice) -> Conditions:
        """Return the conditions of the inputs at `index`."""
        rows = {name: row[index] for name, row in self.rows.items()}
        return Conditions(self.values, rows, self.shared, self.constants)

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of one call with all `N` inputs, nested as captured."""
        flat: dict[str, Any] = dict(self.constants)
        flat |= self.shared
        flat |= {name: value[self.rows[name]] for name, value in self.values.items()}
        nested: dict[str, Any] = {}
        for name, value in flat.items():
            *parents, last = name.split(SEPARATOR)
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = value
        return _with_sequences(nested)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store in a safetensors file; none if there are no conditions."""
        tensors = {f"condition/{name}": value for name, value in self.values.items()}
        tensors |= {f"condition_row/{name}": row for name, row in self.rows.items()}
        tensors |= {f"condition_shared/{name}": value for name, value in self.shared.items()}
        if self.constants:
            text = json.dumps(self.constants, sort_keys=True).encode()
            tensors["condition_constants"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Conditions:
        """Rebuild the conditions from the tensors of `to_tensors`; other names are ignored."""
        parts: dict[str, dict[str, Tensor]] = {
            "condition": {},
            "condition_row": {},
            "condition_shared": {},
        }
        for name, tensor in tensors.items():
            part, _, key = name.partition("/")
            if key and part in parts:
                parts[part][key] = tensor
        text = tensors.get("condition_constants")
        constants = {} if text is None else json.loads(bytes(text.tolist()))
        return cls(parts["condition"], parts["condition_row"], parts["condition_shared"], constants)


class ConditionRecorder:
    """Collects the arguments other than sample and timestep over many calls of a denoiser."""

    def __init__(self, owner: str, by_sample: Collection[str] | None = None) -> None:
        """Create an empty record.

        Args:
            owner: name of the denoiser's class, for error messages.
            by_sample: names of the arguments that have a row for each sample, as found with another
                number of samples. None: an argument has rows if its first dimension is the number
                of samples in the first call.
        """
        self._owner, self._by_sample = owner, by_sample
        self._distinct: dict[str, list[Tensor]] = {}
        self._known: dict[str, dict[bytes, int]] = {}
        self._rows: dict[str, list[int]] = {}
        self._shared: dict[str, Tensor] = {}
        self._constants: dict[str, Any] = {}
        self._names: list[str] | None = None

    def add(self, arguments: dict[str, Any], batch: int) -> None:
        """Add the arguments of one call with `batch` samples, without sample and timestep.

        Raises:
            StepQuantError: the argument names differ from those of the first call, a value cannot
                be stored, rows differ in shape or dtype, or a value without rows changes.
        """
        flat = self._flat(arguments)
        names = sorted(flat)
        if self._names is None:
            self._names = names
        if names != self._names:
            self._fail(
                f"got the arguments {names} after {self._names}",
                "the same at every call, with guidance in two passes too; give those that a pass "
                "leaves out as well, or guide in one batch",
            )
        for name, value in flat.items():
            if not isinstance(value, Tensor):
                self._add_constant(name, value)
            elif name in self._shared or self._is_shared(name, value, batch):
                self._add_shared(name, value)
            else:
                self._add_rows(name, value, batch)

    def by_sample(self) -> set[str]:
        """Return the names of the arguments with a row for each sample."""
        return set(self._rows)

    def _is_shared(self, name: str, value: Tensor, batch: int) -> bool:
        if name in self._rows:
            return False
        if self._by_sample is not None and name not in self._by_sample:
            return True
        return value.dim() == 0 or value.shape[0] != batch

    def _add_constant(self, name: str, value: Any) -> None:
        try:
            json.dumps(value)
        except TypeError:
            self._fail(
                f"got {type(value).__name__} as '{name}'",
                "tensors, numbers, texts, None, and tuples and dictionaries of these",
            )
        if self._constants.setdefault(name, value) != value:
            self._fail(f"got {value!r} as '{name}' after {self._constants[name]!r}", "one value")

    def _add_shared(self, name: str, value: Tensor) -> None:
        kept = self._shared.setdefault(name, value.detach().clone())
        if kept.shape != value.shape or not torch.equal(kept, value):
            self._fail(
                f"got a tensor {list(value.shape)} as '{name}', which changes between calls",
                "a tensor with one row for each sample, or the same one at every call",
            )

    def _add_rows(self, name: str, value: Tensor, batch: int) -> None:
        if value.dim() == 0 or value.shape[0] != batch:
            self._fail(
                f"got a tensor {list(value.shape)} as '{name}' for {batch} samples",
                "a row for each sample, as in the first call",
            )
        distinct, known = self._distinct.setdefault(name, []), self._known.setdefault(name, {})
        for row in value.detach().cpu().contiguous():
            if distinct and (row.shape, row.dtype) != (distinct[0].shape, distinct[0].dtype):
                self._fail(
                    f"got rows {list(row.shape)} of {row.dtype} as '{name}' after "
                    f"{list(distinct[0].shape)} of {distinct[0].dtype}",
                    "rows of one shape; pad prompts to one length",
                )
            digest = hashlib.blake2b(row.view(-1).view(torch.uint8).numpy().tobytes()).digest()
            if digest not in known:
                known[digest] = len(distinct)
                distinct.append(row.clone())
            self._rows.setdefault(name, []).append(known[digest])

    def conditions(self) -> Conditions:
        """Return the conditions of all added calls, in order."""
        return Conditions(
            {name: torch.stack(rows) for name, rows in self._distinct.items()},
            {name: torch.tensor(rows) for name, rows in self._rows.items()},
            self._shared,
            self._constants,
        )

    def _flat(self, arguments: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Flatten nested dictionaries, and tuples and lists that hold tensors, to dotted names.

        An empty dictionary stays, because the denoiser may require the argument.
        """
        flat: dict[str, Any] = {}
        for name, value in arguments.items():
            if not isinstance(name, str) or SEPARATOR in name:
                self._fail(
                    f"got a dictionary with the key {name!r} in '{prefix.rstrip(SEPARATOR)}'",
                    f"keys that are texts without '{SEPARATOR}'",
                )
            if isinstance(value, tuple | list) and tensors_in(value):
                mark = "@" if isinstance(value, list) else "#"
                value = {f"{mark}{index}": entry for index, entry in enumerate(value)}
            if isinstance(value, dict) and value:
                flat |= self._flat(value, f"{prefix}{name}{SEPARATOR}")
            else:
                flat[prefix + name] = value
        return flat

    def _fail(self, found: str, expected: str) -> NoReturn:
        raise StepQuantError(f"{self._owner} {found}: expected {expected}")


def _with_sequences(value: Any) -> Any:
    """Turn dictionaries of positions in `value` back into new tuples and lists."""
    if not isinstance(value, dict):
        return value
    entries = {name: _with_sequences(entry) for name, entry in value.items()}
    for mark, kind in MARKS.items():
        if entries and all(name.startswith(mark) for name in entries):
            return kind(entries[f"{mark}{index}"] for index in range(len(entries)))
    return entries
