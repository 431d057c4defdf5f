import pytest
import torch

from stepquant.numerics import check_bits, max_code, max_codes
from stepquant.support.errors import StepQuantError


@pytest.mark.parametrize("bits", range(1, 9))
def test_check_bits_returns_what_is_allowed(bits: int) -> None:
    assert check_bits(bits, "weight bits") == bits


@pytest.mark.parametrize("bits", [0, 9, -1, True, 4.0, "4", None], ids=repr)
def test_check_bits_names_what_is_wrong(bits: object) -> None:
    with pytest.raises(StepQuantError, match=f"weight bits is {bits!r}: .* from 1 to 8"):
        check_bits(bits, "weight bits")


def test_max_code() -> None:
    assert [max_code(bits) for bits in range(1, 9)] == [1, 3, 7, 15, 31, 63, 127, 255]


def test_largest_codes_of_a_tensor_of_bits() -> None:
    bits = torch.arange(1, 9, dtype=torch.uint8)
    assert max_codes(bits).tolist() == [max_code(b) for b in range(1, 9)]
    assert max_codes(bits).dtype == torch.float32
