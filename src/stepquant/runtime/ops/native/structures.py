"""The C structures and enumerations of `abi.h`, as Python packs them.

This is their only definition in Python. On loading, `Library` compares the library's own
description (`layout` in `level.cpp`) with this one. So it reports a field that was added, moved or
renamed on one side only, instead of misreading it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

WORD = 8  # bytes: the size of every field that is not a structure


class Structure:
    """Format of one C structure: words, then at most one nested structure.

    `pack` takes one argument per field, in order, and returns the structure's bytes. Addresses are
    integers, flags are 0 or 1, and a nested structure is the bytes that its own `pack` returned.
    """

    def __init__(self, name: str, fields: str, last: tuple[str, Structure] | None = None) -> None:
        """Define a structure.

        `fields`: names separated by spaces. `last`: name and format of a nested structure, or None.
        """
        words = fields.split()
        self.name = name
        self.fields = {field: WORD * place for place, field in enumerate(words)}
        layout = f"{len(words)}q"
        if last is not None:
            self.fields[last[0]] = WORD * len(words)
            layout += f"{last[1].size}s"
        compiled = struct.Struct(layout)
        self.size: int = compiled.size
        self.pack: Callable[..., bytes] = compiled.pack

    def __str__(self) -> str:
        """The size and each field's offset in bytes, on one line, as the library writes them."""
        return f"{self.name} {self.size}: " + _listed(self.fields)


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


IMAGE = Structure("Image", "data bf16 channels stride_b stride_c stride_h stride_w")
SHAPE = Structure("Shape", "batch channels height width")
GRID = Structure("Grid", "scale zero_point row rows largest factors")
OUTPUT = Structure("Output", "codes start channels pad_h pad_w", ("grid", GRID))
ROWS = Structure("Rows", "data bf16 batch count channels")
CODES = Structure(
    "Codes",
    "codes batch height width channels stride_b stride_h stride_w taps_h taps_w tap_h tap_w",
)
WEIGHT = Structure("Weight", "tiles four_bits out_channels scale sums bias step_bias")
RESULT = Structure("Result", "data bf16 added added_bf16 gate gate_stride")
ENCODED = Structure("Encoded", "codes activation gated", ("grid", GRID))
ATTENTION = Structure(
    "Attention",
    "q k v query_stride key_stride value_stride batch heads head_dim queries keys codes",
    ("grid", GRID),
)
# In the order of `abi.h`.
STRUCTURES = (IMAGE, SHAPE, GRID, OUTPUT, ROWS, CODES, WEIGHT, RESULT, ENCODED, ATTENTION)

ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3}
STATUS = {"done": 0, "row_outside": 1, "no_memory": 2, "not_finite": 3}


def layout() -> list[str]:
    """The description that the library must match: one line per structure and enumeration."""
    lines = [str(each) for each in STRUCTURES]
    return [*lines, f"Activation: {_listed(ACTIVATIONS)}", f"Status: {_listed(STATUS)}"]


def difference(found: str) -> str | None:
    """The first difference between the library's description and this module's, or None.

    `found`: the library's description. The difference is a sentence for an error message.
    """
    theirs, ours = found.splitlines(), layout()
    for line, own in zip(theirs, ours, strict=False):
        if line != own:
            return f"the library has '{line}' where native/structures.py has '{own}'"
    if len(theirs) != len(ours):
        return f"the library describes {len(theirs)} types, native/structures.py {len(ours)}"
    return None
