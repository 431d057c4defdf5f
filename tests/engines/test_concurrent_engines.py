"""Engines that several threads call at once."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from concurrent_calls import PATIENCE, at_once
from layer_cases import input_for, seeded
from openvino_models import around, needs_openvino
from stepquant.engines.fastest import FastestDenoiser
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.quantizers import StepContext
from stepquant.simulation.packing import pack_layer

pytestmark = [needs_openvino, pytest.mark.usefixtures("one_thread")]
STEPS = (0, 10, 20, 40)


@pytest.fixture
def denoiser(simulate: Any, context: StepContext) -> nn.Module:
    return around(pack_layer(simulate(seeded("conv3x3"), 4, 7)), context)


def asked(number: int) -> tuple[torch.Tensor, int]:
    return input_for("conv3x3", 1 + number % 2) + number, STEPS[number % 4]


@pytest.mark.parametrize("first", [True, False], ids=["first-calls", "later-calls"])
def test_openvino_gives_each_thread_its_numbers(denoiser, first):
    engine = OpenVinoDenoiser(denoiser)
    alone = [engine(*asked(number)) for number in range(4)]
    if first:
        engine = OpenVinoDenoiser(denoiser)
    calls = [lambda n=n: [engine(*asked(n)) for _ in range(50)] for n in range(4)]
    for found, expected in zip(at_once(*calls), alone, strict=True):
        assert all(torch.equal(y, expected) for y in found)
    assert len(engine._compiled) == 2


def test_calls_that_run_at_once_have_requests_of_their_own(denoiser):
    """Two calls meet after both have taken a request."""
    engine = OpenVinoDenoiser(denoiser)
    alone = [engine(*asked(number)) for number in (0, 2)]
    (compiled,) = engine._compiled.values()
    meet = threading.Barrier(2)

    class Meeting:
        def __init__(self, request: Any) -> None:
            self.request = request

        def infer(self, *args: Any, **kwargs: Any) -> Any:
            meet.wait(PATIENCE)
            return self.request.infer(*args, **kwargs)

    model, requests = compiled.model, []

    def made() -> Meeting:
        requests.append(Meeting(model.create_infer_request()))
        return requests[-1]

    compiled.model = SimpleNamespace(create_infer_request=made)
    compiled.idle.clear()
    found = at_once(*(lambda n=n: engine(*asked(n)) for n in (0, 2)))
    assert all(map(torch.equal, found, alone))
    assert len(requests) == 2 and set(map(id, compiled.idle)) == set(map(id, requests))


def test_fastest_chooses_once_for_all_threads(denoiser, caplog):
    engine = FastestDenoiser(denoiser)
    found = at_once(*(lambda: engine(*asked(0)) for _ in range(3)))
    assert len([record for record in caplog.records if "runs on" in record.message]) == 1
    assert all(torch.equal(y, found[0]) for y in found)
