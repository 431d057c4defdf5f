"""A packed layer's weight as a kernel wants it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from stepquant.runtime.kernels.onednn import CallConstants
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native.products import Weight


@dataclass
class PreparedPart:
    """Input part number `index` of a layer: its kernel, with the weight in that kernel's layout.

    `reasons`: why faster kernels do not take it. `weight` and `rest`: what the kernel's `prepare`
    gave; `weight` is None where each call lays it out (`layers.resident`). `grid`: the activation
    grid, at row 0. `start`: the part's first in-channel. `constants`, `held` and `grid_in_force`
    (with its addresses) are filled by `runtime.layers.codes`.
    """

    index: int
    spec: LayerSpec
    kernel_name: str
    kernel: ModuleType
    reasons: list[str]
    weight: Tensor | None
    rest: tuple[Tensor, ...]
    grid: Grid
    start: int
    constants: CallConstants | None = None
    held: Weight | None = None
    grid_in_force: tuple[Grid, tuple[int, ...]] | None = None
