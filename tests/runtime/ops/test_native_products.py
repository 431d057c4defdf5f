"""The native integer product of each instruction set against int64 and float64.

A set that the machine lacks is emulated; the ids of the tests say which is which.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from emulated_products import MACROS, emulated
from fused_paths import ACTIVATIONS, TABLE, assert_codes
from kernel_cases import CASES, Case, int64_reference
from stepquant.runtime.kernels import native as kernel
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.ops import native
from stepquant.runtime.ops.encoding import pad
from stepquant.runtime.ops.grids import Grid
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import Library, build, products, tiled_weight, tiles
from stepquant.runtime.ops.result_shapes import shape_of
from stepquant.support.errors import StepQuantError

LEVELS = (*build.X86.product_levels, *build.ARM.product_levels)


def conv(channels: int, out: int, size: int = 3, **more: tuple[int, int]) -> LayerSpec:
    return LayerSpec("conv2d", channels, out, 8, 8, (size, size), **more)


# What the cases of test_kernels.py are too small for.
LARGE = [
    Case("rows-in-place", conv(64, 40, padding=(1, 1)), (2, 3, 16), 9),
    Case("rows-of-48", conv(64, 33, padding=(1, 1)), (1, 5, 48), 200),
    Case("strided-in-place", conv(128, 16, padding=(1, 1), stride=(2, 2)), (1, 6, 32), 3),
    Case("many-chunks", conv(256, 70, padding=(1, 1)), (1, 8, 16), 255, extreme=True),
    Case("many-chunks-gathered", conv(136, 48, padding=(1, 1)), (2, 9, 11), 1),
    Case("one-tile", conv(64, 3, padding=(1, 1)), (4, 28, 28), 77),
    Case("one-by-one-in-place", conv(128, 64, 1), (2, 4, 8), 31),
    Case("tokens", LayerSpec("linear", 192, 100, 8, 8), (2, 77), 4),
    Case("even-tokens", LayerSpec("linear", 320, 64, 4, 4), (3, 64), 7),
    Case("wide", LayerSpec("linear", 4096, 300, 8, 8), (2, 3), 128, extreme=True),
]
# By minimal filtering where there is AVX2 only: whole and parted runs of tiles, one and several
# blocks of runs, and the most channels whose sums fit.
LARGE += [
    Case("filtered-smallest", conv(32, 5, padding=(1, 1)), (1, 8, 8), 17),
    Case("filtered-wide-rows", conv(32, 16, padding=(1, 1)), (2, 4, 70), 128),
    Case("filtered-no-padding", conv(64, 33), (3, 8, 12), 0),
    Case("filtered-many-blocks", conv(96, 20, padding=(1, 1)), (2, 32, 32), 255),
    Case("filtered-extreme", conv(320, 24, padding=(1, 1)), (1, 8, 16), 0, extreme=True),
    Case("filtered-deepest", conv(1792, 16, padding=(1, 1)), (1, 8, 8), 255, extreme=True),
    Case("too-deep-to-filter", conv(1824, 16, padding=(1, 1)), (1, 8, 8), 255, extreme=True),
    Case("odd-height", conv(32, 16, padding=(1, 1)), (1, 9, 8), 40),
    Case("odd-width", conv(32, 16, padding=(1, 1)), (1, 8, 9), 40),
]
# The same with weights of four bits or less, which are unpacked.
FOUR_BITS = [
    replace(
        case,
        name=f"{case.name}-w{bits}",
        spec=replace(case.spec, weight_bits=bits, activation_bits=8),
    )
    for number, case in enumerate(LARGE)
    for bits in ((4,) if number % 3 else (2, 4))
]
LARGE += FOUR_BITS
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


@functools.cache
def library(level: str) -> Library | str:
    try:
        return Library(product_level=level)
    except OSError as error:
        return str(error)


def form_of(level: str) -> str:
    """How the tests of the level run on this machine."""
    if isinstance(library(level), Library):
        return "real"
    return "emulated" if level in MACROS else "missing"


@pytest.fixture(scope="session")
def emulated_products(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Library]:
    folder = tmp_path_factory.mktemp("emulated")
    return functools.cache(lambda level: emulated(level, folder))


@pytest.fixture(params=LEVELS, ids=lambda level: f"{level}-{form_of(level)}")
def loaded(request: pytest.FixtureRequest, emulated_products: Callable[[str], Library]) -> Library:
    found = library(request.param)
    if isinstance(found, Library):
        return found
    if request.param not in MACROS:
        pytest.skip(found)
    try:
        return emulated_products(request.param)
    except OSError as error:
        pytest.skip(str(error))


def grid_of(case: Case, scale: float = 1.0) -> Grid:
    zero_point = torch.tensor([case.act_zero_point], dtype=torch.uint8)
    return Grid(torch.tensor([scale]), zero_point, None, 255)


def run(
    loaded: Library,
    case: Case,
    grid: Grid,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    step_bias: Tensor | None = None,
    added: Tensor | None = None,
    overwrite: bool = False,
    dtype: torch.dtype = torch.float32,
    gate: Tensor | None = None,
) -> Tensor:
    inputs, spec = case.inputs(), case.spec
    tiles, scale, sums = NATIVE.prepare(inputs["weight"], weight_scale, spec)
    held = tiled_weight.weight_of(tiles, scale, sums, bias, step_bias)
    codes = inputs["codes"]
    if spec.kind == "conv2d":
        codes = pad(codes, torch.tensor([case.act_zero_point]), spec.padding)
    return products.products(loaded, codes, grid, held, spec, added, overwrite, dtype, gate)


@functools.cache
def sums_of(case: Case) -> Tensor:
    inputs = case.inputs()
    return int64_reference(inputs["codes"], inputs["weight"], case.act_zero_point, case.spec)


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
    with pytest.raises(StepQuantError, match="outside its table"):
        run(loaded, case, table(case, row), torch.ones(case.spec.out_channels))


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
    with pytest.raises(StepQuantError, match="outside its table"):
        products.product_codes(
            loaded, inputs["codes"], grid_of(case), held, spec, "none", False, outside
        )


@pytest.mark.parametrize(
    ("out_channels", "gated", "fits"),
    [(48, False, True), (48, True, False), (64, True, True), (40, False, False)],
)
def test_codes_take_whole_tiles(out_channels: int, gated: bool, fits: bool) -> None:
    assert tiles.fits_in_tiles(LayerSpec("linear", 8, out_channels, 8, 8), gated) == fits
    assert not tiles.fits_in_tiles(LayerSpec("conv2d", 8, out_channels, 8, 8), gated)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["linear", "conv2d"]),
    channels=st.integers(1, 140),
    out=st.integers(1, 40),
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bits=st.integers(1, 8),
)
def test_the_layout_gives_the_weight_back(
    kind: str, channels: int, out: int, kernel_size: tuple[int, int], bits: int
) -> None:
    size = kernel_size if kind == "conv2d" else (1, 1)
    spec = LayerSpec(kind, channels, out, bits, 8, size)
    generator = torch.Generator().manual_seed(channels)
    codes = torch.randint(0, 2**bits, spec.weight_shape, generator=generator)
    lowest = torch.randint(
        -128, 129 - 2**bits, (out, *(1,) * (codes.dim() - 1)), generator=generator
    )
    weight = (codes + lowest).to(torch.int8)
    laid_out = NATIVE.lay_out(weight, torch.ones(out), spec)
    assert torch.equal(NATIVE.differences(laid_out, spec), weight)
    tiles, chunks = -(-out // 16), -(-spec.columns // 64)
    if laid_out.dtype == torch.uint8:
        assert laid_out.shape == (tiles, 64 + chunks * 512)
    else:
        assert laid_out.shape == (tiles, chunks, 16, 16, 4)


@pytest.mark.parametrize(("span", "dtype"), [(15, torch.uint8), (16, torch.int8)])
def test_four_bits_are_for_what_fits_in_each_row(span: int, dtype: torch.dtype) -> None:
    weight = torch.zeros(20, 64, dtype=torch.int8)
    weight[:, 0] = torch.arange(20) * 5 - 50
    weight[:, 1:] = weight[:, :1]
    weight[7, 5] += span
    spec = LayerSpec("linear", 64, 20, 8, 8)
    laid_out = NATIVE.lay_out(weight, torch.ones(20), spec)
    assert laid_out.dtype == dtype and torch.equal(NATIVE.differences(laid_out, spec), weight)


def test_columns_that_overflow_are_left_to_other_kernels() -> None:
    spec = LayerSpec("linear", kernel.MOST_COLUMNS + 1, 1, 8, 8)
    reason = NATIVE.why_not(spec, torch.device("cpu"))
    assert reason is not None and f"the layer has {spec.columns}" in reason.text
    # The most extreme codes and weights still fit, with the zero point's share.
    assert 255 * 128 * kernel.MOST_COLUMNS < 2**31


ALL_X86 = tuple(build.X86.product_levels)


@pytest.mark.skipif(build.X86.levels != build.LEVELS, reason="a cap names x86-64's sets only")
@pytest.mark.parametrize(
    ("cap", "expected", "passes"),
    [
        ("", ALL_X86, "avx512"),
        ("ALL", ALL_X86, "avx512"),
        ("default", ALL_X86, "avx512"),
        ("AVX512_CORE_AMX", ALL_X86, "avx512"),
        ("avx10_1_512_amx", ALL_X86, "avx512"),
        ("AVX512_CORE_BF16", ("avx2", "avx_vnni", "vnni"), "avx512"),
        ("AVX512_CORE_VNNI", ("avx2", "avx_vnni", "vnni"), "avx512"),
        ("AVX512_CORE", ("avx2", "avx_vnni"), "avx512"),
        ("AVX2_VNNI_2", ("avx2", "avx_vnni"), "avx2"),
        ("AVX2_VNNI", ("avx2", "avx_vnni"), "avx2"),
        ("AVX2", ("avx2",), "avx2"),
        ("AVX", (), "base"),
        ("SSE41", (), "base"),
    ],
)
def test_a_cap_of_onednn_is_one_of_ours(
    cap: str, expected: tuple[str, ...], passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    uncapped = {name: isinstance(library(name), Library) for name in LEVELS}
    if not native.available():
        pytest.skip(str(native.why_not()))
    best = Library().level
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", cap)
    for level in LEVELS:
        found = library.__wrapped__(level)
        assert isinstance(found, Library) == (level in expected and uncapped[level])
        assert isinstance(found, Library) or "no integer products of" in found
    names = list(build.LEVELS)
    assert Library().level == min(best, passes, key=names.index)


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
