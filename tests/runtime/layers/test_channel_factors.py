"""Grids with a factor for each channel, in each form of what makes codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fast_models import STATIC, assert_near, packed, plain_blocks, plain_copy, predictor
from fused_paths import (
    ACTIVATIONS,
    COARSE,
    GRID,
    TABLE,
    Path,
    assert_codes,
    assert_image,
    draw,
    image,
)
from kernel_cases import Case
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.ops import fused, native
from stepquant.runtime.ops.encoding import encode as packed_encode
from stepquant.runtime.ops.grids import Grid, Output
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import products, tiled_weight
from stepquant.runtime.ops.native.attention_call import attention_codes
from stepquant.simulation.packing import pack_layer
from stepquant.support.errors import StepQuantError


def factors(channels: int) -> Tensor:
    return draw(channels, seed=9).exp()


def scaled(grid: Grid, channels: int) -> Grid:
    return grid._replace(factors=factors(channels))


def test_group_norm(path: Path) -> None:
    parts = [image(2, 40, 5, 7), image(2, 24, 5, 7, seed=1, dtype=torch.bfloat16)]
    outputs = [
        Output(0, 64, scaled(TABLE, 64), (1, 1)),
        Output(0, 64, GRID, (0, 0)),
        Output(13, 30, scaled(COARSE, 30), (0, 1)),
    ]
    found = path.group_norm_encode(parts, None, 8, None, None, 1e-5, "silu", outputs)
    x = torch.cat([part.double() for part in parts], dim=1)
    y = functional.silu(functional.group_norm(x, 8))
    for codes, out in zip(found, outputs, strict=True):
        values = y[:, out.start : out.start + out.channels]
        if out.grid.factors is not None:
            values = values * out.grid.factors.double()[:, None, None]
        assert_image(codes, values, out.grid, out.padding)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [1, 48, 530])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "slice", "transposed"])
def test_images(path: Path, layout: str, channels: int, activation: str) -> None:
    x = {
        "contiguous": draw(2, channels, 3, 19),
        "channels-last": image(2, channels, 3, 19),
        "slice": image(2, channels + 5, 3, 19)[:, 5:],
        "transposed": image(2, channels, 19, 3).transpose(2, 3),
    }[layout]
    codes = path.encode(x, activation, scaled(TABLE, channels), (1, 0))
    y = ACTIVATIONS[activation](x.double()) * factors(channels).double()[:, None, None]
    assert_image(codes, y, TABLE, (1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (3, 1), (3, 700), (40, 3, 500)], ids=str)
def test_rows(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, of_channels = draw(*shape, dtype=dtype), factors(shape[-1])
    grid = scaled(TABLE, shape[-1])
    y = ACTIVATIONS["silu"](x.double()) * of_channels.double()
    assert_codes(path.encode(x, "silu", grid), y, TABLE)
    # Without an activation these are the very floats of the packed layer, ties and all.
    exact = packed_encode(x * of_channels, *grid.in_force(), 8)
    if dtype == torch.float32:
        assert torch.equal(path.encode(x, "none", grid), exact)


def test_layer_norm(path: Path) -> None:
    x, shift = draw(2, 5, 70), draw(2, 70, seed=1)
    grids = [scaled(TABLE, 70), GRID]
    found = path.layer_norm_encode(x, None, None, 1e-5, None, shift, grids)
    y = functional.layer_norm(x.double(), (70,)) + shift.double()[:, None]
    assert_codes(found[0], y * factors(70).double(), TABLE)
    assert_codes(found[1], y, GRID)


@pytest.mark.parametrize("channels", [1, 48, 700])
def test_gated(path: Path, channels: int) -> None:
    x = draw(3, 2 * channels)
    values, gates = x.double().chunk(2, dim=-1)
    y = values * functional.gelu(gates) * factors(channels).double()
    assert_codes(path.gated_encode(x, "gelu", scaled(TABLE, channels)), y, TABLE)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("out_channels", [32, 96])
def test_codes_of_products(out_channels: int, gated: bool) -> None:
    library = native.library()
    if library is None or library.products is None:
        pytest.skip(str(native.why_no_products()))
    case = Case("tokens", LayerSpec("linear", 192, out_channels, 8, 8), (2, 77), 4)
    inputs, spec = case.inputs(), case.spec
    state = NATIVE.prepare(inputs["weight"], torch.rand(out_channels) / 192, spec)
    held = tiled_weight.weight_of(*state, None, None)
    grid = Grid(torch.tensor([0.01]), torch.tensor([4], dtype=torch.uint8), None, 255)
    arguments = (library, inputs["codes"], grid, held, spec)
    y = products.products(*arguments, None, False, torch.float32).double()
    y = y.chunk(2, dim=-1)[0] * functional.gelu(y.chunk(2, dim=-1)[1]) if gated else y
    channels = y.shape[-1]
    activation = "gelu" if gated else "none"
    codes = products.product_codes(*arguments, activation, gated, scaled(TABLE, channels))
    assert_codes(codes, y * factors(channels).double(), TABLE)
    with pytest.raises(StepQuantError, match=f"for {channels} channels"):
        products.product_codes(*arguments, activation, gated, scaled(TABLE, channels + 1))


def test_codes_of_attention() -> None:
    library = native.library()
    if library is None or library.attention is None:
        pytest.skip(str(native.why_not() or "no AMX on this machine"))
    q, k, v = (draw(2, rows, 120, seed=rows, dtype=torch.bfloat16) for rows in (37, 77, 77))
    fine = TABLE._replace(scale=TABLE.scale / 100)
    codes = attention_codes(library, q, k, v, 3, scaled(fine, 120))
    heads = [each.double().unflatten(-1, (3, -1)).transpose(1, 2) for each in (q, k, v)]
    y = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    places = y * factors(120).double() / fine.scale[1].double() + 37
    # Of float32, exact to a 2^-9 of the largest value, in steps of the grid.
    steps = float(v.abs().max()) * 2**-9 / float(fine.scale[1]) * factors(120).double()
    assert bool(((codes - places.clamp(0, 255)).abs() <= 0.5 + steps).all())
    with pytest.raises(StepQuantError, match="for 120 channels"):
        attention_codes(library, q, k, v, 3, scaled(fine, 40))


def test_factors_of_other_channels_are_refused() -> None:
    grid = scaled(GRID, 5)
    for call in (
        lambda: fused.encode(draw(2, 6), "none", grid),
        lambda: fused.encode(draw(2, 6, 5, 5), "none", grid),
        lambda: fused.gated_encode(draw(2, 12), "gelu", grid),
        lambda: fused.layer_norm_encode(draw(2, 6), None, None, 1e-5, None, None, [GRID, grid]),
        lambda: fused.group_norm_encode(
            [image(1, 6, 2, 2)], None, 2, None, None, 1e-5, "none", [Output(0, 6, grid, (0, 0))]
        ),
    ):
        with pytest.raises(StepQuantError, match=r"factors of \(5,\) for 6 channels"):
            call()


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_native_refuses_other_factors() -> None:
    doubles = GRID._replace(factors=torch.ones(4, dtype=torch.float64))
    apart = GRID._replace(factors=torch.ones(8)[::2])
    for grid in (doubles, apart):
        with pytest.raises(StepQuantError, match="expected contiguous float32 scales and factors"):
            fused.encode(draw(2, 4), "none", grid)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "pixart"])
def test_blocks_whose_layers_scale_their_channels_stay_fast(name: str) -> None:
    fast = packed(name, STATIC)
    for layer in fast.modules():
        if isinstance(layer, IntegerLayer):
            layer.register_buffer("act_channel_scale", 1 / factors(layer.spec.in_channels))
            layer.drop_layout()
    predict = predictor(fast)
    found = predict(fast)
    assert_near(found, predict(plain_copy(fast)))
    assert plain_blocks(fast) == plain_blocks(packed(name, STATIC))
    # Another model than without: the factors are what the layers see.
    assert (found - predict(packed(name, STATIC))).norm() > 0.1 * found.norm()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("size", [(2, 5, 7), (2, 8, 7)], ids=str)
def test_rows_of_four_dimensions_are_no_image(size: tuple[int, ...], simulate: Any) -> None:
    """As linear layers have them that run over images with their channels last."""
    layer = simulate(nn.Linear(8, 24), steps=1)
    layer.multiply_channel_scale(1 / factors(8))
    packed_layer = pack_layer(layer)
    x = draw(*size, 8)
    expected = packed_layer(x.flatten(0, 2)).view(*size, 24)
    assert torch.equal(packed_layer(x), expected)
