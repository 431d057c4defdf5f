"""Linear layers of a few rows: each form against integers, and packed layers that use it."""

from __future__ import annotations

import pytest
import torch
from fused_paths import GRID, PATHS, TABLE, Path, draw
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import assert_agrees, seeded

from stepquant.errors import StepQuantError
from stepquant.runtime import codes, fused
from stepquant.runtime.pack import pack_layer


@settings(max_examples=20)
@given(
    rows=st.integers(1, 9),
    channels=st.integers(1, 70),
    out_channels=st.integers(1, 70),
    activation=st.sampled_from(["none", "silu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    grid=st.sampled_from([GRID, TABLE]),
)
@pytest.mark.parametrize("name", PATHS)
def test_sums_are_those_of_integers(name, rows, channels, out_channels, activation, dtype, grid):
    x = draw(rows, channels, dtype=dtype)
    weight = (draw(out_channels, channels, seed=1) * 60).clamp(-128, 127).to(torch.int8)
    weight_scale, bias = draw(out_channels, seed=2).abs() + 0.1, draw(out_channels, seed=3)
    path = Path(name)
    found = path.linear_of_few_rows(x, activation, grid, weight, weight_scale, bias)
    row = 0 if grid.row is None else int(grid.row)
    differences = path.encode(x, activation, grid).long() - int(grid.zero_point[row])
    total = differences @ weight.long().t()
    expected = total.double() * grid.scale[row].double() * weight_scale.double() + bias.double()
    assert found.dtype == torch.float32 and found.shape == (rows, out_channels)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-4)


def test_a_weight_of_other_channels_is_refused():
    weight = torch.zeros(4, 5, dtype=torch.int8)
    with pytest.raises(StepQuantError, match=r"the weight is \(4, 5\): expected \(4, 6\)"):
        fused.linear_of_few_rows(draw(2, 6), "none", GRID, weight, torch.ones(4), draw(4))


@pytest.mark.parametrize("rows", [1, codes.FEW_ROWS, codes.FEW_ROWS + 1])
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias"])
def test_a_packed_layer_agrees_with_its_simulation(kind, rows, simulate):
    layer = simulate(seeded(kind), 4, 8)
    layer.context.set_timestep(30)
    x = draw(rows, 12)
    assert_agrees(codes.run_rows(pack_layer(layer), x, "silu"), layer(torch.nn.functional.silu(x)))
