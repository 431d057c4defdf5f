"""Each form of the functions of images against the same computed plainly in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fused_paths import (
    ACTIVATIONS,
    COARSE,
    GRID,
    NATIVE,
    PATHS,
    TABLE,
    Path,
    assert_codes,
    assert_image,
    draw,
    image,
)
from stepquant.runtime.ops import fused, native, plain
from stepquant.runtime.ops.encoding import encode as packed_encode
from stepquant.runtime.ops.fused import Grid, Output
from stepquant.support.errors import StepQuantError


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def normed(
    parts: list[Tensor],
    added: Tensor | None,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    eps: float = 1e-5,
) -> Tensor:
    x = torch.cat([part.double() for part in parts], dim=1)
    if added is not None:
        x = x + added.double()[:, :, None, None]
    weight, bias = (None if each is None else each.double() for each in (weight, bias))
    return ACTIVATIONS[activation](functional.group_norm(x, groups, weight, bias, eps))


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    size=st.tuples(st.integers(1, 20), st.integers(1, 70)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    data=st.data(),
)
@pytest.mark.parametrize("name", PATHS)
def test_group_norm_of_any_shape(
    name: str,
    batch: int,
    widths: list[int],
    size: tuple[int, int],
    padding: tuple[int, int],
    data: st.DataObject,
) -> None:
    path, channels = Path(name), sum(widths)
    pixels = size[0] * size[1]
    assume(channels * pixels > 1)  # torch refuses groups of one value
    divisors = [n for n in range(1, channels + 1) if not channels % n]
    groups = data.draw(st.sampled_from([n for n in divisors if channels // n * pixels > 1]))
    activation = data.draw(st.sampled_from(["none", "silu"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    parts = [image(batch, w, *size, seed=i, dtype=dtype) + i for i, w in enumerate(widths)]
    added = draw(batch, channels, seed=4) if data.draw(st.booleans()) else None
    weight = draw(channels, seed=5) + 1 if data.draw(st.booleans()) else None
    bias = draw(channels, seed=6) if data.draw(st.booleans()) else None
    first = data.draw(st.integers(0, channels - 1))
    outputs = [
        Output(0, channels, TABLE, padding),
        Output(first, channels - first, COARSE, (0, 0)),
        Output(0, first + 1, GRID, (1, 0)),
    ]
    # This eps keeps groups of a few values from dividing rounding errors by nothing.
    found = path.group_norm_encode(parts, added, groups, weight, bias, 1e-2, activation, outputs)
    y = normed(parts, added, groups, weight, bias, activation, 1e-2)
    for codes, out in zip(found, outputs, strict=True):
        assert_image(codes, y[:, out.start : out.start + out.channels], out.grid, out.padding)


@pytest.mark.parametrize("layout", ["contiguous", "slice", "every-other-row", "flipped-axes"])
def test_group_norm_reads_any_layout(path: Path, layout: str) -> None:
    x = image(2, 48, 10, 12)
    part = {
        "contiguous": x.contiguous(),
        "slice": x[:, 16:32],
        "every-other-row": x[:, :, ::2],
        "flipped-axes": x.transpose(2, 3),
    }[layout]
    outputs = [Output(0, part.shape[1], GRID, (1, 1))]
    (codes,) = path.group_norm_encode([part], None, 4, None, None, 1e-5, "silu", outputs)
    assert_image(codes, normed([part], None, 4, None, None, "silu"), GRID, (1, 1))


@pytest.mark.parametrize("name", NATIVE)
def test_native_group_norm_far_from_zero(name: str) -> None:
    """Sums of squares cancel here, and do in torch: the mean is a thousand deviations."""
    path = Path(name)
    x, added = image(1, 32, 24, 24) + 1000, draw(1, 32) * 0.1 + 300
    outputs = [Output(0, 32, COARSE, (0, 0))]
    (codes,) = path.group_norm_encode([x], added, 2, None, None, 1e-5, "none", outputs)
    y = normed([x], added, 2, None, None, "none")
    difference = codes - (y / 0.3 + 6).clamp(0, 15)
    assert difference.abs().max() <= 0.5 + 0.01


def test_group_norm_of_what_is_constant(path: Path) -> None:
    x, bias = torch.full((1, 8, 4, 4), 3.7), torch.full((8,), 0.9)
    outputs = [Output(0, 8, GRID, (0, 0))]
    (codes,) = path.group_norm_encode([x], None, 2, None, bias, 1e-5, "none", outputs)
    assert bool((codes == 50).all())


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("name", NATIVE)
def test_threads_do_not_change_codes(name: str, batch: int, restored_threads: None) -> None:
    path = Path(name)
    parts = [image(batch, 80, 17, 19), image(batch, 48, 17, 19, seed=1, dtype=torch.bfloat16)]
    rows, outputs = draw(batch, 60, 320), [Output(0, 128, GRID, (1, 1))]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(
            [
                *path.group_norm_encode(
                    parts, draw(batch, 128), 8, None, None, 1e-5, "silu", outputs
                ),
                *path.layer_norm_encode(rows, None, None, 1e-5, None, None, [GRID]),
                path.gated_encode(rows, "gelu", GRID),
                path.encode(rows, "silu", GRID),
                path.encode(parts[0], "silu", GRID, (1, 1)),
            ]
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@settings(max_examples=20)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 70)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    activation=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(["contiguous", "channels-last", "slice", "transposed"]),
)
@pytest.mark.parametrize("name", PATHS)
def test_encode_of_images(
    name: str,
    shape: tuple[int, int, int, int],
    padding: tuple[int, int],
    activation: str,
    dtype: torch.dtype,
    layout: str,
) -> None:
    x = draw(*shape, dtype=dtype) * 3
    if layout in ("channels-last", "slice"):
        x = x.to(memory_format=torch.channels_last)
    if layout == "slice":
        x = x[:, shape[1] // 3 :]
    if layout == "transposed":
        x = x.transpose(2, 3)
    codes = Path(name).encode(x, activation, TABLE, padding)
    assert_image(codes, ACTIVATIONS[activation](x.double()), TABLE, padding)


@pytest.mark.parametrize("shape", [(7,), (3, 700), (2, 3, 5), (2, 3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("grid", [GRID, TABLE, COARSE], ids=["one-row", "table", "4-bit"])
def test_encode_of_other_shapes(
    path: Path, shape: tuple[int, ...], activation: str, grid: Grid
) -> None:
    for x in (draw(*shape) * 3, draw(*shape, dtype=torch.bfloat16).transpose(0, -1)):
        codes = path.encode(x, activation, grid)
        assert codes.is_contiguous()
        assert_codes(codes, ACTIVATIONS[activation](x.double()), grid)


@pytest.mark.parametrize("grid", [GRID, TABLE, COARSE], ids=["one-row", "table", "4-bit"])
def test_encode_equals_the_packed_layers(path: Path, grid: Grid) -> None:
    """Ties and values far outside too."""
    row = 0 if grid.row is None else 1
    scale, zero_point = grid.scale[row : row + 1], grid.zero_point[row : row + 1]
    x = torch.cat([draw(20000) * 5, (torch.arange(600) - 300) / 2 * scale, draw(100) * 1e9])
    bits = grid.largest.bit_length()
    assert torch.equal(path.encode(x, "none", grid), packed_encode(x, scale, zero_point, bits))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations_far_out(path: Path, activation: str) -> None:
    grid = Grid(torch.tensor([1.0]), torch.tensor([128], dtype=torch.uint8), None, 255)
    x = torch.tensor([-3.4e38, -1e30, -1000.0, -90.0, 0.0, 90.0, 1000.0, 1e30, 3.4e38])
    codes = path.encode(x, activation, grid).tolist()
    assert codes == [128, 128, 128, 128, 128, 218, 255, 255, 255]


@pytest.mark.parametrize("row", [-1, 3])
@pytest.mark.parametrize("name", NATIVE)
def test_native_refuses_a_row_outside_the_table(name: str, row: int) -> None:
    path, grid = Path(name), TABLE._replace(row=torch.tensor([row]))
    for call in (
        lambda: path.encode(draw(5), "none", grid),
        lambda: path.encode(image(1, 4, 2, 2), "none", grid),
        lambda: path.gated_encode(draw(4, 6), "gelu", grid),
        lambda: path.layer_norm_encode(draw(4, 6), None, None, 1e-5, None, None, [GRID, grid]),
        lambda: path.epilogue(grid, draw(4), None, None, True),
        lambda: path.group_norm_encode(
            [image(1, 4, 2, 2)], None, 2, None, None, 1e-5, "none", [Output(0, 4, grid, (0, 0))]
        ),
    ):
        with pytest.raises(StepQuantError, match="outside its step table"):
            call()


def test_public_functions_take_what_the_native_ones_cannot() -> None:
    """Other dtypes, and images of nothing."""
    x, outputs = draw(2, 8, 3, 3), [Output(0, 8, GRID, (1, 1))]
    for dtype in (torch.float16, torch.float64):
        codes = fused.encode(x.to(dtype), "silu", GRID)
        assert torch.equal(codes, plain.encode(x.to(dtype), "silu", GRID))
        (codes,) = fused.group_norm_encode(
            [x.to(dtype)], None, 2, None, None, 1e-5, "silu", outputs
        )
        assert codes.shape == (2, 8, 5, 5)
    assert fused.encode(x[:0], "none", GRID).shape == (0, 8, 3, 3)


@pytest.mark.skipif(not native.available(), reason=str(native.why_not()))
def test_native_refuses_other_grids() -> None:
    grid = GRID._replace(zero_point=torch.tensor([20], dtype=torch.int32))
    with pytest.raises(StepQuantError, match="one uint8 zero point for each scale"):
        fused.encode(draw(4), "none", grid)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "gelu"}, "expected none or silu"),
        ({"groups": 3}, "8 channels: expected a multiple of its 3 groups"),
        ({"weight": torch.ones(7)}, "the weight is"),
        ({"added": torch.ones(2, 7)}, "the added tensor is"),
        (
            {"outputs": [Output(4, 5, GRID, (0, 0))]},
            "takes channels 4 to 9: expected a range within the 8",
        ),
        (
            {"parts": [torch.ones(2, 4, 3, 3), torch.ones(2, 4, 3, 4)]},
            "expected equal batch, height",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_group_norm_refuses(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "parts": [torch.ones(2, 8, 3, 3)],
        "added": None,
        "groups": 2,
        "weight": None,
        "bias": None,
        "eps": 1e-5,
        "activation": "silu",
        "outputs": [Output(0, 8, GRID, (0, 0))],
    }
    with pytest.raises(StepQuantError, match=message):
        fused.group_norm_encode(**{**arguments, **changes})  # type: ignore[arg-type]
