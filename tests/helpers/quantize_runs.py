"""What the tests of `quantize` share: short settings, and looks at folders and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

TINY = {
    "calibration.trajectories": 2,
    "block_distillation.iterations": 3,
    "block_distillation.samples": 16,
    "block_distillation.batch": 4,
}
# The search over ranges costs most of the time here and has tests of its own.
FAST = {**TINY, "ranges.weights": "minmax", "ranges.activations": "minmax"}
RECONSTRUCT = {key.replace("distillation", "reconstruction"): value for key, value in FAST.items()}
FAST_MINMAX = {"calibration.trajectories": 1}
# Nine blocks on pictures of 8 x 8.
SMALL = {
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "sample_size": 8,
}
BLOCKS = 9


class Lines(Reporter):
    """Shows nothing and keeps the lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def tree(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below `folder`, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def left(folder: Path) -> list[str]:
    """Names in `folder`."""
    return sorted(path.name for path in folder.iterdir())


def refused(act) -> str:
    """The one sentence that `act` is refused with."""
    with pytest.raises(StepQuantError) as error:
        act()
    assert "\n" not in str(error.value)
    return str(error.value)
