"""The layout of weights for the native products: it loses nothing, and says what fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.runtime.kernels import native as kernel
from stepquant.runtime.kernels.native import NATIVE
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.runtime.ops.native import tiles


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


@pytest.mark.parametrize(
    ("out_channels", "gated", "fits"),
    [(48, False, True), (48, True, False), (64, True, True), (40, False, False)],
)
def test_codes_take_whole_tiles(out_channels: int, gated: bool, fits: bool) -> None:
    assert tiles.fits_in_tiles(LayerSpec("linear", 8, out_channels, 8, 8), gated) == fits
    assert not tiles.fits_in_tiles(LayerSpec("conv2d", 8, out_channels, 8, 8), gated)


def test_columns_that_overflow_are_left_to_other_kernels() -> None:
    spec = LayerSpec("linear", kernel.MOST_COLUMNS + 1, 1, 8, 8)
    reason = NATIVE.why_not(spec, torch.device("cpu"))
    assert reason is not None and f"the layer has {spec.columns}" in reason.text
    # The most extreme codes and weights still fit, with the zero point's share.
    assert 255 * 128 * kernel.MOST_COLUMNS < 2**31
