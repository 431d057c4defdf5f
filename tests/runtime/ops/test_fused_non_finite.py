"""NaN and infinity in floats that become codes: each native function reports them, wherever."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_paths import GRID, NATIVE, Path, draw, image
from stepquant.models.non_finite import NonFiniteError
from stepquant.runtime.ops.fused import Output

BAD = [float("nan"), float("inf"), -float("inf")]
FACTORS = GRID._replace(factors=torch.rand(9) + 0.5)
OUTPUTS = [Output(0, 9, GRID, (1, 1)), Output(2, 3, GRID, (0, 0))]

# Each takes a form of the functions and the floats that become codes.
CALLS: dict[str, Callable[[Path, Tensor], object]] = {
    "group_norm": lambda path, x: path.group_norm_encode(
        [x[:, :6], x[:, 6:]], None, 3, None, None, 1e-5, "silu", OUTPUTS
    ),
    "added": lambda path, x: path.group_norm_encode(
        [image(2, 9, 3, 70)], x[:, :, 0, 0], 3, None, None, 1e-5, "none", OUTPUTS
    ),
    "pixels": lambda path, x: path.encode(x, "none", GRID, (1, 1)),
    "pixels with factors": lambda path, x: path.encode(x, "gelu", FACTORS),
    "planes": lambda path, x: path.encode(x.contiguous(), "silu", GRID),
    "flat": lambda path, x: path.encode(x.flatten(1), "gelu_tanh", GRID),
    "layer_norm": lambda path, x: path.layer_norm_encode(
        x.flatten(2), None, None, 1e-5, None, None, [GRID, GRID]
    ),
    "scale": lambda path, x: path.layer_norm_encode(
        draw(2, 5, 9), None, None, 1e-5, x[:, :, 0, 0], None, [GRID]
    ),
    "shift": lambda path, x: path.layer_norm_encode(
        draw(2, 5, 9), None, None, 1e-5, None, x[:, :, 0, 0], [GRID]
    ),
    "values": lambda path, x: path.gated_encode(
        torch.cat([x.flatten(2), draw(2, 9, 210)], dim=-1), "gelu", GRID
    ),
    "gates": lambda path, x: path.gated_encode(
        torch.cat([draw(2, 9, 210), x.flatten(2)], dim=-1), "silu", GRID
    ),
}
OF_SAMPLES = ("added", "scale", "shift")  # take one value for each channel of a sample
OF_PRODUCTS = ("values", "gates")  # whose product overflows


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NATIVE)
def test_a_native_function_reports_it(name: str, call: str) -> None:
    path = Path(name)
    for dtype in (torch.float32, torch.bfloat16):
        x = image(2, 9, 3, 70, dtype=dtype)
        CALLS[call](path, x)
        for channel, row, column in ((0, 0, 0), (8, 2, 69), (5, 1, 33)):
            if call in OF_SAMPLES:
                row = column = 0
            for bad in BAD:
                broken = x.clone()
                broken[1, channel, row, column] = bad
                with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
                    CALLS[call](path, broken)


@pytest.mark.parametrize(
    "call", [each for each in CALLS if each not in (*OF_SAMPLES, *OF_PRODUCTS)]
)
@pytest.mark.parametrize("name", NATIVE)
def test_the_largest_floats_are_not_reported(name: str, call: str) -> None:
    x = image(2, 9, 3, 70)
    x[1, 4, 1, 5], x[0, 2, 0, 3] = 3e38, -3e38
    CALLS[call](Path(name), x)


@pytest.mark.parametrize("name", NATIVE)
def test_a_gated_product_that_overflows_is_reported(name: str) -> None:
    with pytest.raises(NonFiniteError, match="hold NaN or infinity"):
        Path(name).gated_encode(torch.full((2, 4, 6), 3e38), "gelu", GRID)
