import pytest

from stepquant.errors import StepQuantError
from stepquant.numerics import check_bits, max_code


@pytest.mark.parametrize("bits", range(1, 9))
def test_check_bits_returns_what_is_allowed(bits: int) -> None:
    assert check_bits(bits, "weight bits") == bits


@pytest.mark.parametrize("bits", [0, 9, -1, True, 4.0, "4", None], ids=repr)
def test_check_bits_names_what_is_wrong(bits: object) -> None:
    with pytest.raises(StepQuantError, match=f"weight bits is {bits!r}: .* from 1 to 8"):
        check_bits(bits, "weight bits")


def test_max_code() -> None:
    assert [max_code(bits) for bits in range(1, 9)] == [1, 3, 7, 15, 31, 63, 127, 255]
