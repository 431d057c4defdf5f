"""What tests of the runtime share."""

from __future__ import annotations

import pytest
from fused_paths import PATHS, Path


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    """The functions of `runtime.ops.fused`, in each of their forms."""
    return Path(request.param)
