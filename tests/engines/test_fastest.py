"""The backend that times both ways; skipped where OpenVINO is not installed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from layer_cases import assert_agrees, input_for, seeded
from openvino_models import around, needs_openvino, needs_vnni
from stepquant.engines.fastest import TIMED_CALLS, FastestDenoiser, seconds_of
from stepquant.quantizers import StepContext
from stepquant.simulation.packing import pack_layer

pytestmark = [needs_openvino, needs_vnni]


@torch.no_grad()
def test_it_chooses_once_for_each_shape_and_says_what(
    simulate: Any, context: StepContext, caplog: pytest.LogCaptureFixture
) -> None:
    packed = around(pack_layer(simulate(seeded("conv3x3"), 4, 8)), context)
    fastest = FastestDenoiser(packed)
    for batch, timestep in ((3, 0), (3, 40), (1, 40)):
        x, at = input_for("conv3x3", batch), torch.tensor(timestep)
        assert_agrees(fastest(x, at), packed(x, at))
    assert len(fastest.choices) == 2
    assert set(fastest.choices.values()) <= {"packed", "openvino"}
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2 and "runs on" in said[0].message


def test_the_first_call_is_not_timed():
    calls = []
    assert seconds_of(lambda: calls.append(1)) >= 0
    assert len(calls) == 1 + TIMED_CALLS
