"""Recorded denoisers that several threads call at once.

The layers run on the reference kernel, which can be recorded on every machine with the library.
"""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from concurrent_calls import at_once, meeting
from packed_models import packed_unet
from stepquant.engines.backend import set_backend
from stepquant.engines.captured_calls import RecordedDenoiser
from stepquant.engines.captured_calls import denoiser as room
from stepquant.engines.captured_calls.state import contexts_of
from stepquant.runtime.ops import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not native.available(), reason="no native library"),
]
PLACES = ["down_blocks.1", "mid_block", "up_blocks.1"]
STEPS = (0, 225, 450, 675, 900)


@pytest.fixture
def model(monkeypatch) -> nn.Module:
    monkeypatch.setattr(native, "why_no_products", lambda: None)
    found = packed_unet(bypass=True, step_bias=True).eval()
    set_backend(found, "reference")
    return found


def call(model: nn.Module, batch: int, seed: int, step: int) -> Tensor:
    x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(x, torch.tensor(STEPS[step % 5])).sample


def random_calls(count: int, seed: int) -> list[tuple[int, int, int]]:
    draw = random.Random(seed)
    return [(draw.choice([1, 2]), n, draw.randrange(5)) for n in range(count)]


def assert_alone(model: nn.Module, found: list[Tensor], asked: list[tuple[int, int, int]]) -> None:
    for y, given in zip(found, asked, strict=True):
        assert torch.equal(y, call(model, *given))


def test_threads_share_recordings(model):
    engine, asked = RecordedDenoiser(model), random_calls(20, 0)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda each: call(engine, *each), asked))
    assert (engine.recordings, engine.reasons) == (2, [])
    assert_alone(model, found, asked)


def test_engines_of_several_threads_share_one_model(model):
    """As `sample` in several threads does; one thread calls the model itself."""
    engines = [RecordedDenoiser(model), RecordedDenoiser(model), model]
    asked = [random_calls(8, seed) for seed in range(3)]
    calls = [
        lambda engine=engine, own=own: [call(engine, *each) for each in own]
        for engine, own in zip(engines, asked, strict=True)
    ]
    for found, own in zip(at_once(*calls), asked, strict=True):
        assert_alone(model, found, own)
    assert [engine.recordings for engine in engines[:2]] == [2, 2]


def test_a_call_meets_a_recording_in_the_middle(model, monkeypatch):
    """Another thread calls the model from start to end while one records."""
    engine, asked = RecordedDenoiser(model), [(2, 0, 4), (2, 1, 0), (2, 2, 2)]
    expected = [call(model, *each) for each in asked]
    others: list[Tensor] = []
    products = type(model.conv_out).forward

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if self is model.conv_out and recording and not others:
            others.append(torch.empty(0))
            others[:] = at_once(lambda: call(model, *asked[2]))
        return products(self, x)

    recording: list[int] = []
    record = room._record
    monkeypatch.setattr(room, "_record", lambda *args: (recording.append(1), record(*args))[1])
    monkeypatch.setattr(type(model.conv_out), "forward", forward)
    found = [call(engine, *each) for each in asked[:2]]
    monkeypatch.undo()
    assert recording and torch.equal(others[0], expected[2])
    assert all(map(torch.equal, found, expected))


def test_rows_that_outlast_a_recording_are_not_its_own(model):
    engine = RecordedDenoiser(model)
    for step in (1, 1):
        call(engine, 1, 0, step)
    assert engine.recordings == 1
    (context,) = contexts_of(model)
    at_once(lambda: [call(engine, 1, 0, step) for step in (3, 4, 3, 4)])
    assert context.rows.tolist() == [1]


def test_calls_that_are_not_recorded_run_side_by_side(model):
    engine = RecordedDenoiser(model)
    asked = [(1, 0, 0), (2, 1, 4)]
    with meeting(model, PLACES):  # hooks, with which nothing is recorded
        for _ in range(3):
            found = at_once(*(lambda each=each: call(engine, *each) for each in asked))
    assert engine.recordings == 0
    assert_alone(model, found, asked)


def test_weights_are_laid_out_before_a_recording(model):
    engine = RecordedDenoiser(copy.deepcopy(model))
    expected = call(model, 1, 0, 2)
    call(engine, 1, 1, 0)
    engine.denoiser.conv_out.drop_layout()
    assert torch.equal(call(engine, 1, 0, 2), expected)
    spans = engine._known.of(room._Recording)[0]._recorder.memory.spans()
    weight = engine.denoiser.conv_out.prepared_parts()[0].weight.layout.weight
    assert not any(start <= weight.data_ptr() < start + size for start, size in spans)
