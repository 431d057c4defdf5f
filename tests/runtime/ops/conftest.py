"""Native libraries with the integer products of each instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from emulated_products import MACROS, emulated
from product_cases import LEVELS, form_of, library
from stepquant.runtime.ops.native import Library


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
