"""The native integer product of each instruction set against int64 and float64.

A set that the machine lacks is emulated; the ids of the tests say which is which.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_cases import CASES, Case
from product_cases import LARGE, conv, grid_of, run, sums_of
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import Library, products, tiled_weight
from stepquant.runtime.ops.result_shapes import shape_of
from stepquant.support.errors import StepQuantError

THREADS = (1, 2, 5)
# Neighbouring weights whose products with the largest codes just fit in 16 bits, once, eight and
# sixteen times, and those that just do not: (largest code, weight, other weight).
PAIRS = [
    (255, 64, 64),
    (255, 65, 64),
    (255, -64, -64),
    (255, -128, 0),
    (255, -128, -1),
    (255, 127, 127),
    (255, 127, -128),
    (255, 8, 8),
    (255, 9, 8),
    (255, 4, 4),
    (255, 5, 4),
    (127, 127, 127),
    (127, -128, -128),
    (15, 8, 8),
    (15, -128, -8),
    (15, -128, -9),
    (1, 127, 127),
]


@pytest.mark.parametrize(("largest", "first", "second"), PAIRS)
@pytest.mark.parametrize("rows", [1, 6, 16, 33])
def test_pairs_at_the_edge_of_16_bits_are_exact(
    loaded: Library, largest: int, first: int, second: int, rows: int
) -> None:
    """A level that adds pairs of products in 16 bits must know when they do not fit."""
    spec = LayerSpec("linear", 256, 40, 8, 8)
    weight = torch.zeros(40, 256, dtype=torch.int8)
    weight[:, 0::2], weight[:, 1::2] = first, second
    weight[20:] = torch.randint(-2, 3, (20, 256))  # tiles of one product may differ
    weight[20, 130:132] = torch.tensor([first, second])
    codes = torch.full((rows, 256), largest, dtype=torch.uint8)
    codes[1::2] = torch.randint(0, largest + 1, codes[1::2].shape, dtype=torch.uint8)
    codes[2::4] = 0  # as extreme where codes are made signed first
    held = tiled_weight.weight_of(*NATIVE.prepare(weight, torch.ones(40), spec), None, None)
    grid = Grid(torch.ones(1), torch.zeros(1, dtype=torch.uint8), None, largest)
    y = products.products(loaded, codes, grid, held, spec, None, False, torch.float32)
    assert torch.equal(y.double(), codes.double() @ weight.double().T)


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_sums_are_exact(loaded: Library, case: Case) -> None:
    y = run(loaded, case, grid_of(case), torch.ones(case.spec.out_channels))
    expected = sums_of(case)
    assert y.shape == expected.shape and y.dtype == torch.float32
    # Beyond 2^24 the sum is rounded to float32, once.
    assert torch.equal(y, expected.to(torch.float32))


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_threads_do_not_change_the_result(loaded: Library, case: Case) -> None:
    scales = torch.rand(case.spec.out_channels) + 0.1
    before, found = torch.get_num_threads(), []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            found.append(run(loaded, case, grid_of(case, 0.013), scales, bias=scales))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)


def everything(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments that do all at once, and what is to come of them, float64."""
    generator = torch.Generator().manual_seed(5)
    spec, sums = case.spec, sums_of(case)
    channels, batch = spec.out_channels, sums.shape[0]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight_scale, bias, step_bias = draw(channels).abs() + 0.1, draw(channels), draw(3, channels)
    gate, added = draw(batch, channels), draw(*sums.shape).to(dtype)
    if spec.kind == "conv2d":
        added = added.contiguous(memory_format=torch.channels_last)
    shape = (1, -1, 1, 1) if spec.kind == "conv2d" else (-1,)
    gates = gate[:, :, None, None] if sums.dim() == 4 else gate
    gates = gate.view(batch, *(1,) * (sums.dim() - 2), -1) if spec.kind == "linear" else gates
    y = sums.double() * 0.0125 * weight_scale.double().view(shape)
    y = (y + bias.double().view(shape) + step_bias[2].double().view(shape)) * gates.double()
    arguments = {
        "weight_scale": weight_scale,
        "bias": bias,
        "step_bias": step_bias,
        "gate": gate,
        "added": added,
    }
    return arguments, y + added.double()


def table(case: Case, row: int) -> Grid:
    zero_points = torch.tensor([0, 1, case.act_zero_point], dtype=torch.uint8)
    return Grid(torch.tensor([1.0, 2.0, 0.0125]), zero_points, torch.tensor([row]), 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_scales_biases_gate_and_sum(loaded: Library, case: Case, dtype: torch.dtype) -> None:
    arguments, expected = everything(case, dtype)
    kept = arguments["added"].clone()
    y = run(loaded, case, table(case, 2), dtype=dtype, **arguments)
    largest, precision = expected.abs().max(), 2**-8 if dtype == torch.bfloat16 else 2e-6
    assert y.dtype == dtype and y.shape == expected.shape
    assert (y - expected).abs().max() < precision * largest
    assert torch.equal(arguments["added"], kept)
    memory_format = torch.channels_last if y.dim() == 4 else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format)


def test_bfloat16_is_the_nearest(loaded: Library) -> None:
    case = LARGE[0]
    arguments, _ = everything(case, torch.float32)
    exact = run(loaded, case, table(case, 2), **arguments)
    rounded = run(loaded, case, table(case, 2), dtype=torch.bfloat16, **arguments)
    assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_what_is_added_is_overwritten_only_where_that_is_allowed(loaded: Library) -> None:
    case = LARGE[0]
    arguments, _ = everything(case, torch.float32)
    expected = run(loaded, case, table(case, 2), **arguments)
    y = run(loaded, case, table(case, 2), overwrite=True, **arguments)
    assert y is arguments["added"] and torch.equal(y, expected)


def test_what_is_added_may_lie_in_another_order(loaded: Library) -> None:
    case = LARGE[0]
    arguments, _ = everything(case, torch.float32)
    expected = run(loaded, case, table(case, 2), **arguments)
    arguments["added"] = arguments["added"].contiguous()
    assert torch.equal(run(loaded, case, table(case, 2), **arguments), expected)


@pytest.mark.parametrize("row", [-1, 3])
def test_a_row_outside_the_table_is_refused(loaded: Library, row: int) -> None:
    case = LARGE[0]
    with pytest.raises(StepQuantError, match="outside its step table"):
        run(loaded, case, table(case, row), torch.ones(case.spec.out_channels))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (LayerSpec("linear", 64, 32, 8, 8), (2, 5, 128)),
        (LayerSpec("linear", 64, 32, 8, 8), (2, 5, 60)),
        (conv(64, 32), (1, 128, 6, 6)),
        (conv(64, 32), (1, 4, 6, 6)),
    ],
    ids=["wide-rows", "narrow-rows", "many-channels", "few-channels"],
)
def test_other_channels_are_refused(
    loaded: Library, spec: LayerSpec, shape: tuple[int, ...]
) -> None:
    codes = torch.zeros(shape, dtype=torch.uint8)
    state = NATIVE.prepare(torch.ones(spec.weight_shape, dtype=torch.int8), torch.ones(32), spec)
    held = tiled_weight.weight_of(*state, None, None)
    with pytest.raises(StepQuantError, match=f"channels: expected {spec.in_channels}"):
        products.products(loaded, codes, grid_of(LARGE[0]), held, spec, None, False, torch.float32)
    with pytest.raises(StepQuantError, match=f"channels: expected {spec.in_channels}"):
        zero_point = torch.tensor([3], dtype=torch.int32)
        NATIVE.run(state, codes, torch.ones(1), zero_point, None, None, spec)


def test_an_image_smaller_than_the_kernel_is_refused() -> None:
    with pytest.raises(StepQuantError, match="an image of 2 x 2, with its padding, is smaller"):
        shape_of(torch.zeros(1, 8, 2, 2), conv(8, 8, stride=(2, 2)))


@pytest.mark.parametrize("spec", [conv(64, 32), LayerSpec("linear", 64, 32, 8, 8)], ids=str)
def test_no_samples_give_no_samples(spec: LayerSpec) -> None:
    codes = torch.zeros((0, 64, 6, 6) if spec.kind == "conv2d" else (0, 7, 64), dtype=torch.uint8)
    state = NATIVE.prepare(torch.ones(spec.weight_shape, dtype=torch.int8), torch.ones(32), spec)
    y = NATIVE.bind(state, None, None, spec).run(
        codes, grid_of(LARGE[0]), None, False, torch.float32, None
    )
    assert y.shape == ((0, 32, 4, 4) if spec.kind == "conv2d" else (0, 7, 32))


@pytest.mark.parametrize(
    "changes",
    [{"added": torch.zeros(1, 40, 3, 16)}, {"gate": torch.zeros(1, 40)}],
    ids=["added", "gate"],
)
def test_what_does_not_fit_the_result_is_refused(
    loaded: Library, changes: dict[str, Tensor]
) -> None:
    case = LARGE[0]
    with pytest.raises(StepQuantError, match="expected float32 or bfloat16"):
        run(loaded, case, grid_of(case), torch.ones(40), **changes)
    half = {name: torch.zeros(2, 40, 3, 16, dtype=torch.float16) for name in ("added",)}
    with pytest.raises(StepQuantError, match="float16"):
        run(loaded, case, grid_of(case), torch.ones(40), **half)
