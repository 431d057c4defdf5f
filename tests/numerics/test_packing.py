from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stepquant.numerics import (
    max_code,
    pack_bits,
    pack_channels,
    packed_size,
    unpack_bits,
    unpack_channels,
)
from stepquant.support.errors import StepQuantError


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, max_code(bits)), max_size=67)), bits


@given(codes_and_bits())
def test_unpacking_gives_the_codes_back(case: tuple[list[int], int]) -> None:
    codes, bits = case
    packed = pack_bits(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(st.binary(max_size=67), st.integers(1, 8), st.integers(0, 7))
def test_unused_bits_do_not_matter(stream: bytes, bits: int, fewer: int) -> None:
    count = max(0, 8 * len(stream) // bits - fewer)
    stream = stream[: packed_size(count, bits)]
    number = int.from_bytes(stream, "little")
    codes = [(number >> index * bits) & max_code(bits) for index in range(count)]
    packed = torch.tensor(list(stream), dtype=torch.uint8)
    assert unpack_bits(packed, bits, count).tolist() == codes


@given(codes_and_bits())
def test_packed_bytes_are_the_stream_as_one_little_endian_number(
    case: tuple[list[int], int],
) -> None:
    codes, bits = case
    number = sum(code << (index * bits) for index, code in enumerate(codes))
    expected = number.to_bytes((len(codes) * bits + 7) // 8, "little")
    assert bytes(pack_bits(torch.tensor(codes, dtype=torch.int32), bits).tolist()) == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_only_the_last_byte_has_unused_bits(bits: int, count: int) -> None:
    packed = pack_bits(torch.full((count,), max_code(bits)), bits)
    assert packed.numel() == packed_size(count, bits)
    assert 0 <= 8 * packed.numel() - count * bits < 8
    ones = sum(int(byte).bit_count() for byte in packed)
    assert ones == count * bits


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [1, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0b00000001, 0b00000011]),
        (2, [1, 2, 3, 0, 2], [0b00_11_10_01, 0b10]),
        # 3 bits: the third code has two bits in the first byte and its highest in the second.
        (3, [1, 2, 5, 7], [0b01_010_001, 0b0000_111_1]),
        (4, [1, 2, 15], [0x21, 0x0F]),
        (5, [31, 1, 16], [0b001_11111, 0b0_10000_00]),
        (6, [63, 0, 33], [0b00_111111, 0b0001_0000, 0b10]),
        (7, [127, 64], [0b0_1111111, 0b00_100000]),
        (8, [0, 255, 129], [0, 255, 129]),
    ],
    ids=lambda value: f"{value}bits" if isinstance(value, int) else None,
)
def test_golden_bytes(bits: int, codes: list[int], expected: list[int]) -> None:
    assert pack_bits(torch.tensor(codes), bits).tolist() == expected
    packed = torch.tensor(expected, dtype=torch.uint8)
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


def test_codes_of_any_shape_are_read_row_by_row() -> None:
    codes = torch.arange(12).view(3, 4)
    assert torch.equal(pack_bits(codes, 4), pack_bits(codes.flatten(), 4))
    columns = pack_bits(codes.t(), 4)
    assert torch.equal(columns, pack_bits(codes.t().contiguous().flatten(), 4))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_whole_numbers_of_any_dtype_pack_alike(dtype: torch.dtype) -> None:
    codes = torch.tensor([0, 7, 3, 5, 1])
    assert torch.equal(pack_bits(codes.to(dtype), 3), pack_bits(codes, 3))


@pytest.mark.parametrize(
    ("codes", "found"),
    [
        (torch.tensor([0, 16]), r"0\.\.16: expected 0\.\.15 for 4 bits"),
        (torch.tensor([-1, 3]), r"-1\.\.3: expected 0\.\.15"),
        (torch.tensor([65536 + 3]), r"65539\.\.65539: expected 0\.\.15"),
        (torch.tensor([1.0, 2.5]), r"hold 2\.5: expected whole numbers"),
        (torch.tensor([float("nan")]), "hold nan: expected whole numbers"),
        (torch.tensor([float("inf")]), "hold inf: expected whole numbers"),
    ],
    ids=["too-large", "negative", "beyond-int16", "fraction", "nan", "infinity"],
)
def test_codes_off_the_grid_are_refused(codes: Tensor, found: str) -> None:
    with pytest.raises(StepQuantError, match=f"codes to pack .*{found}"):
        pack_bits(codes, 4)


@pytest.mark.parametrize("bits", [0, 9, True])
def test_bits_are_checked_on_both_sides(bits: int) -> None:
    with pytest.raises(StepQuantError, match=f"bits of the codes to pack is {bits}: expected"):
        pack_bits(torch.zeros(4), bits)
    with pytest.raises(StepQuantError, match=f"bits of the packed codes is {bits}: expected"):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), bits, 4)


@pytest.mark.parametrize("found", [1, 3])
def test_a_wrong_number_of_bytes_is_refused(found: int) -> None:
    packed = torch.zeros(found, dtype=torch.uint8)
    with pytest.raises(StepQuantError, match=f"hold {found} bytes: expected 2 for 5 codes of 3"):
        unpack_bits(packed, 3, 5)


@pytest.mark.parametrize(
    "packed",
    [torch.zeros(2, dtype=torch.int8), torch.zeros(2), torch.zeros(1, 2, dtype=torch.uint8)],
    ids=["int8", "float32", "two-dimensions"],
)
def test_what_is_not_a_row_of_bytes_is_refused(packed: Tensor) -> None:
    with pytest.raises(StepQuantError, match="expected one dimension of uint8"):
        unpack_bits(packed, 4, 4)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=9), st.integers(0, 11), st.integers(0, 99))
def test_mixed_channel_bits_round_trip_at_full_density(
    channel_bits: list[int], columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.tensor(channel_bits)
    codes = torch.randint(0, 256, (len(bits), columns), generator=generator)
    codes = (codes % (2 ** bits[:, None])).to(torch.uint8)
    packed = pack_channels(codes, bits)
    assert torch.equal(unpack_channels(packed, bits, columns), codes)
    groups = {value: channel_bits.count(value) for value in channel_bits}
    expected = sum((value * count * columns + 7) // 8 for value, count in groups.items())
    assert packed.numel() == expected


def test_golden_bytes_of_mixed_channels() -> None:
    codes = torch.tensor([[9, 10, 11], [1, 0, 3], [1, 2, 3]])
    packed = pack_channels(codes, torch.tensor([4, 2, 4]))
    # The 2-bit channel first; then both 4-bit channels as one stream of six codes.
    assert packed.tolist() == [0b11_00_01, 0xA9, 0x1B, 0x32]


def test_equal_channel_bits_pack_like_one_stream() -> None:
    codes = torch.arange(15).view(3, 5) % 8
    assert torch.equal(pack_channels(codes, torch.tensor([3, 3, 3])), pack_bits(codes, 3))


@pytest.mark.parametrize(
    "channel_bits",
    [torch.tensor([4]), torch.tensor([4.0, 4.0]), torch.tensor([[4, 4]])],
    ids=["too-few", "floats", "two-dimensions"],
)
def test_channel_bits_are_one_whole_number_for_each_channel(channel_bits: Tensor) -> None:
    with pytest.raises(StepQuantError, match=r"channel bits are .*each of 2 channels"):
        pack_channels(torch.zeros(2, 3), channel_bits)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_of_a_channel_are_checked_on_both_sides(bits: int) -> None:
    channel_bits = torch.tensor([4, bits])
    with pytest.raises(StepQuantError, match=f"is {bits}: expected a whole number of bits"):
        pack_channels(torch.zeros(2, 2), channel_bits)
    with pytest.raises(StepQuantError, match=f"is {bits}: expected a whole number of bits"):
        unpack_channels(torch.zeros(2, dtype=torch.uint8), channel_bits, 2)


@pytest.mark.parametrize("found", [2, 4])
def test_a_wrong_number_of_bytes_for_channels_is_refused(found: int) -> None:
    packed = torch.zeros(found, dtype=torch.uint8)
    with pytest.raises(StepQuantError, match="bytes: expected"):
        unpack_channels(packed, torch.tensor([2, 4]), 4)
