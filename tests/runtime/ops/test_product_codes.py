"""Products that round their result to codes at once, against those that give floats."""

from __future__ import annotations

import pytest
import torch

from fused_paths import ACTIVATIONS, TABLE, assert_codes
from kernel_cases import Case
from product_cases import grid_of
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import Library, products, tiled_weight
from stepquant.support.errors import StepQuantError

CODED = [
    Case("tokens-64", LayerSpec("linear", 192, 64, 8, 8), (2, 77), 4),
    Case("even-tokens-96", LayerSpec("linear", 320, 96, 4, 4), (3, 64), 7),
    Case("deep-tokens-32", LayerSpec("linear", 4200, 32, 8, 8), (2, 40), 128),
    Case("tokens-192-w4", LayerSpec("linear", 192, 192, 4, 8), (2, 77), 4),
    Case("deep-tokens-64-w3", LayerSpec("linear", 4200, 64, 3, 8), (2, 40), 128),
]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CODED, ids=lambda case: case.name)
def test_codes_are_those_of_the_floats(
    loaded: Library, case: Case, activation: str, gated: bool
) -> None:
    """What is not written to memory is what would be."""
    inputs, spec = case.inputs(), case.spec
    weight_scale = torch.rand(spec.out_channels) / spec.in_channels
    bias = torch.randn(spec.out_channels)
    held = tiled_weight.weight_of(*NATIVE.prepare(inputs["weight"], weight_scale, spec), bias, None)
    arguments = (loaded, inputs["codes"], grid_of(case, 0.01), held, spec)
    found = products.product_codes(*arguments, activation, gated, TABLE)
    y = products.products(*arguments, None, False, torch.float32).double()
    values, gates = y.chunk(2, dim=-1) if gated else (None, y)
    y = ACTIVATIONS[activation](gates)
    assert_codes(found, y if values is None else values * y, TABLE)


def test_a_row_of_the_output_grid_outside_its_table_is_refused(loaded: Library) -> None:
    case = CODED[0]
    inputs, spec = case.inputs(), case.spec
    held = tiled_weight.weight_of(
        *NATIVE.prepare(inputs["weight"], torch.ones(spec.out_channels), spec), None, None
    )
    outside = TABLE._replace(row=torch.tensor([3]))
    with pytest.raises(StepQuantError, match="outside its step table"):
        products.product_codes(
            loaded, inputs["codes"], grid_of(case), held, spec, "none", False, outside
        )
