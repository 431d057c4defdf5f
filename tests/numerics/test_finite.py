from __future__ import annotations

import pytest
import torch

from stepquant.numerics.finite import all_finite

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES + EIGHT_BITS, ids=str)
def test_numbers_are_told_from_the_rest(dtype):
    x = torch.linspace(-8, 8, 9).view(3, 3)
    assert all_finite(x.to(dtype)) and all_finite(x[:0].to(dtype))
    x[1, 1] = torch.nan
    assert not all_finite(x.to(dtype))
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        x[1, 1] = torch.inf
        assert not all_finite(x.to(dtype))
