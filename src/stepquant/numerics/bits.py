"""Facts about bit widths: the valid range, the largest code, the zero point of 8-bit weights."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.support.errors import StepQuantError

MIN_BITS, MAX_BITS = 1, 8

# Eight-bit weights are symmetric so that `code - zero point` fits in int8 (-128..127).
WEIGHT_ZERO_POINT_8BIT = 128


def check_bits(bits: int, what: str) -> int:
    """Return `bits` if it is an int from 1 to 8.

    Raises:
        StepQuantError: `bits` is anything else, a bool included. `what` names it in the message.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise StepQuantError(
            f"{what} is {bits!r}: expected a whole number of bits from {MIN_BITS} to {MAX_BITS}"
        )
    return bits


def max_code(bits: int) -> int:
    """Return the largest code of an unsigned `bits`-bit grid; the smallest is 0."""
    return (1 << bits) - 1


def max_codes(bits: Tensor) -> Tensor:
    """Return `max_code` for each of `bits` (whole numbers, any shape), as float32."""
    one = torch.ones_like(bits, dtype=torch.int64)
    return (torch.bitwise_left_shift(one, bits.long()) - 1).to(torch.float32)
