"""Each form of the functions of rows against the same in float64, and of the epilogue."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fused_paths import (
    ACTIVATIONS,
    COARSE,
    GRID,
    PATHS,
    TABLE,
    Path,
    assert_codes,
    draw,
)
from stepquant.runtime.ops import fused
from stepquant.support.errors import StepQuantError


@settings(max_examples=20)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    channels=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
@pytest.mark.parametrize("name", PATHS)
def test_layer_norm(
    name: str, shape: list[int], channels: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    x = draw(*shape, channels, dtype=dtype) * 2 + 1
    weight = draw(channels, seed=1) + 1 if data.draw(st.booleans()) else None
    bias = draw(channels, seed=2) if data.draw(st.booleans()) else None
    chunks = draw(shape[0], 3 * channels, seed=3, dtype=dtype).chunk(3, dim=-1)
    scale = chunks[0] if data.draw(st.booleans()) else None
    shift = chunks[2] if data.draw(st.booleans()) else None
    grids = [TABLE, COARSE, GRID]
    # As above: rows of one or two channels.
    found = Path(name).layer_norm_encode(x, weight, bias, 1e-2, scale, shift, grids)
    double = [None if each is None else each.double() for each in (weight, bias, scale, shift)]
    y = functional.layer_norm(x.double(), (channels,), double[0], double[1], 1e-2)
    middle = (shape[0], *(1,) * (len(shape) - 1), channels)
    if double[2] is not None:
        y = y * (1 + double[2].view(middle))
    if double[3] is not None:
        y = y + double[3].view(middle)
    for codes, grid in zip(found, grids, strict=True):
        assert codes.is_contiguous()
        assert_codes(codes, y, grid)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(14,), (3, 130), (2, 5, 1400)], ids=str)
def test_gated(path: Path, activation: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = draw(*shape, dtype=dtype) * 2
    values, gates = x.double().chunk(2, dim=-1)
    codes = path.gated_encode(x, activation, TABLE)
    assert codes.is_contiguous()
    assert_codes(codes, values * ACTIVATIONS[activation](gates), TABLE)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("has_steps", [False, True], ids=["no-steps", "steps"])
@pytest.mark.parametrize("add_share", [False, True], ids=["no-share", "share"])
def test_epilogue_has_the_packed_layers_bits(
    path: Path, has_bias: bool, has_steps: bool, add_share: bool
) -> None:
    sums, bias, step_bias = draw(37) * 100, draw(37, seed=1), draw(3, 37, seed=2)
    expected = bias if has_bias else torch.zeros(37)
    if has_steps:
        expected = expected + step_bias[1]
    if add_share:
        expected = expected - TABLE.scale[1:2] * TABLE.zero_point[1:2].to(torch.int32) * sums
    scale, found = path.epilogue(
        TABLE, sums, bias if has_bias else None, step_bias if has_steps else None, add_share
    )
    assert torch.equal(scale, TABLE.scale[1:2])
    assert torch.equal(found, expected)


def test_other_refusals() -> None:
    x = draw(2, 7)
    with pytest.raises(StepQuantError, match="unknown activation 'relu'"):
        fused.encode(x, "relu", GRID)
    with pytest.raises(StepQuantError, match="or 4 dimensions"):
        fused.encode(x, "none", GRID, (1, 1))
    with pytest.raises(StepQuantError, match="7 channels: expected an even number"):
        fused.gated_encode(x, "gelu", GRID)
    with pytest.raises(StepQuantError, match="scale is"):
        fused.layer_norm_encode(x, None, None, 1e-5, torch.ones(1, 7), None, [GRID])
    with pytest.raises(StepQuantError, match="bias is"):
        fused.epilogue(GRID, draw(7), draw(6), None, True)
    with pytest.raises(StepQuantError, match="the step bias is"):
        fused.epilogue(TABLE, draw(7), None, draw(2, 7), True)
