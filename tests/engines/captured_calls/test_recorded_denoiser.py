"""Recorded denoisers: the numbers of the denoiser, in every state that it is found in."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, build
from fast_models import FEW, STATIC, TABLES, packed, packed_pipeline
from recorded_models import assert_alike, inputs, predict, scale_a_norm
from stepquant.api import quantize, sample
from stepquant.engines.backend import with_captured_calls
from stepquant.engines.captured_calls import RecordedDenoiser, recorded
from stepquant.engines.captured_calls import denoiser as room
from stepquant.methods import InputErrorBypass
from stepquant.methods.recipe import Recipe
from stepquant.models.input_bypass import bypass_of
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.ops import native

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.why_no_products() is not None, reason=str(native.why_no_products())),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("recipe", [STATIC, TABLES], ids=lambda recipe: recipe.name)
def test_replays_give_the_denoisers_bits(name, recipe):
    plain = packed(name, recipe)
    model = RecordedDenoiser(copy.deepcopy(plain))
    assert_alike(model, plain)
    assert (model.recordings, model.reasons) == (1, [])


def test_each_shape_has_a_recording_of_its_own():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(plain)
    for batch in (1, 3, 1, 2, 3, 1, 2, 2):
        given = inputs(plain, batch, seed=batch)
        assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 3 and model.nbytes > 0
    model.forget()
    assert model.recordings == 0 and model.nbytes == 0


def test_only_the_latest_shapes_are_kept(monkeypatch):
    monkeypatch.setattr(room, "MOST_SHAPES", 2)
    plain = packed("dit")
    model = RecordedDenoiser(plain)
    for batch in (1, 1, 2, 2, 3, 3):
        given = inputs(plain, batch, seed=batch)
        assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 2


def test_results_are_the_callers_own():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    given = [inputs(plain, 1, seed) for seed in range(4)]
    found = [predict(model, each) for each in given]
    for each, result in zip(given, found, strict=True):
        assert torch.equal(result, predict(plain, each))


def test_samples_at_different_steps_run_as_ever():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(plain)
    sample, arguments = inputs(plain, 2, seed=0)
    grid = next(m for m in plain.modules() if isinstance(m, IntegerLayer)).context.grid
    arguments["timestep"] = grid.timesteps[[0, 2]]
    for _ in range(3):
        given = (sample, arguments)
        assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 0 and "reads numbers" in model.reasons[0]


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_the_input_error_bypass_is_recorded(name):
    arguments = ARCHITECTURES[name].arguments
    recipe = Recipe(name="bypass", description="", steps=(InputErrorBypass(),))
    pipeline = quantize(build(name), recipe, 8, 8, None, 3, FEW, **arguments).pipeline
    plain = getattr(pipeline, ARCHITECTURES[name].component)
    model = RecordedDenoiser(plain)
    assert_alike(model, plain)
    assert (model.recordings, model.reasons) == (1, [])
    bypass_of(plain).slopes = bypass_of(plain).slopes * 3
    assert_alike(model, plain)


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_attention_on_integers_is_recorded(name):
    arguments = ARCHITECTURES[name].arguments
    settings = {**FEW, "scheme.attention_bits": 8}
    pipeline = quantize(build(name), STATIC, 8, 8, None, 3, settings, **arguments).pipeline
    plain = getattr(pipeline, ARCHITECTURES[name].component)
    model = RecordedDenoiser(plain)
    assert_alike(model, plain)
    assert (model.recordings, model.reasons) == (1, [])


def test_another_thread_may_forget_while_one_records(monkeypatch):
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    record = room._record
    monkeypatch.setattr(room, "_record", lambda *args: (model.forget(), record(*args))[1])
    assert_alike(model, plain)
    assert model.recordings == 0
    monkeypatch.undo()
    assert_alike(model, plain)
    scale_a_norm(plain)
    assert_alike(model, plain)


def test_a_denoiser_that_calls_its_stand_in_does_not_wait_for_itself():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    given = inputs(plain, 1, 0)
    calls = []

    def again(*_: object) -> None:
        if not calls:
            calls.append(1)
            predict(model, given)

    plain.conv_in.register_forward_hook(again)
    assert torch.equal(predict(model, given), predict(plain, given)) and calls == [1]


def test_its_memory_goes_with_it():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    assert_alike(model, plain)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_gradients_and_autocast_run_as_ever():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    given = inputs(plain, 1, seed=0)
    for _ in range(3):
        assert torch.equal(model(given[0], **given[1])[0], predict(plain, given))
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 0


def test_inference_mode_and_none_after_one_another():
    plain = packed("dit")
    model = RecordedDenoiser(plain)
    for number in range(6):
        given = inputs(plain, 2, seed=number)
        with torch.inference_mode(number % 2 == 0):
            assert torch.equal(predict(model, given), predict(plain, given))
    assert model.recordings == 1


def test_copies_record_their_own():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(copy.deepcopy(plain))
    assert_alike(model, plain)
    other = copy.deepcopy(model)
    assert other.recordings == 0 and other.denoiser is not model.denoiser
    scale_a_norm(other.denoiser)
    scaled = copy.deepcopy(plain)
    scale_a_norm(scaled)
    assert_alike(other, scaled)
    assert_alike(model, plain)


def test_threads_take_turns():
    plain = packed("sd", TABLES)
    model = RecordedDenoiser(plain)
    given = [inputs(plain, 1, seed) for seed in range(8)]
    expected = [predict(plain, each) for each in given]
    found: dict[int, bool] = {}

    def run(number: int) -> None:
        torch.set_num_threads(1)
        calls = [predict(model, given[number]) for _ in range(3)]
        found[number] = all(torch.equal(call, expected[number]) for call in calls)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


def test_it_looks_like_the_denoiser():
    plain = packed("sd")
    model = RecordedDenoiser(plain)
    assert model.config is plain.config and model.dtype == torch.float32
    assert recorded(model) is model and isinstance(recorded(plain), RecordedDenoiser)
    assert recorded(nn.Linear(2, 2)).__class__ is nn.Linear
    plain.train()
    assert recorded(plain) is plain


def test_sampling_records(monkeypatch):
    pipeline = packed_pipeline("dit", TABLES)
    found = []
    monkeypatch.setattr(
        "stepquant.verbs.sample.with_captured_calls",
        lambda *given: found.append(with_captured_calls(*given)) or found[-1],
    )
    options = {"num": 2, "steps": 3, "labels": [0, 1]}
    images = sample(pipeline, **options)
    assert isinstance(found[0].transformer, RecordedDenoiser)
    assert found[0].transformer.recordings == 1
    assert not isinstance(pipeline.transformer, RecordedDenoiser)
    monkeypatch.setattr("stepquant.verbs.sample.with_captured_calls", lambda given, call: given)
    assert torch.equal(sample(pipeline, **options), images)


def test_a_callback_of_the_pipeline_may_change_the_denoiser(monkeypatch):
    pipeline, found = packed_pipeline("sd"), []
    monkeypatch.setattr("stepquant.engines.backend.recorded", found.append)
    sample(
        pipeline,
        num=1,
        steps=2,
        prompts="a boat",
        callback_on_step_end=lambda pipeline, step, timestep, values: values,
    )
    assert found == []
