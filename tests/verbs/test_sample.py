"""`sample` of one pipeline from several threads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import packed_models
from architectures import ARCHITECTURES, build
from concurrent_calls import at_once
from fast_models import FEW, TABLES, layers_of, packed_pipeline
from stepquant.api import quantize, sample, set_backend
from stepquant.engines.backend import with_backend
from stepquant.engines.captured_calls import denoiser as captured
from stepquant.runtime.ops import native

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4


def unet2d() -> Any:
    pipeline = packed_models.packed_pipeline(attention=True, step_bias=True, bypass=True)
    pipeline.unet.eval()
    return pipeline


def assert_drawn_alone(pipeline: Any, times: int = 2, **more: Any) -> None:
    """Two threads, with other seeds and numbers of images, several times over."""
    alone = [sample(pipeline, num, STEPS, seed, **more) for seed, num in ((0, 1), (7, 2))]
    for _ in range(times):
        found = at_once(
            lambda: sample(pipeline, 1, STEPS, 0, **more),
            lambda: sample(pipeline, 2, STEPS, 7, **more),
        )
        assert all(map(torch.equal, found, alone))


@pytest.mark.parametrize("name", ["unet2d", "sd", "dit"])
def test_threads_draw_the_images_that_each_draws_alone(name):
    if name == "unet2d":
        assert_drawn_alone(unet2d(), times=5)
    else:
        assert_drawn_alone(packed_pipeline(name, TABLES), **ARCHITECTURES[name].arguments)


def test_a_server_has_a_scheduler_for_each_thread():
    """The recipe of diffusers: pipelines that share their models."""
    shared = unet2d()
    shared.set_progress_bar_config(disable=True)

    def draw(seed: int, steps: int) -> Any:
        pipeline = copy.copy(shared)
        pipeline.scheduler = DDIMScheduler.from_config(shared.scheduler.config)
        generator = torch.Generator().manual_seed(seed)
        return pipeline(1, generator, num_inference_steps=steps, output_type="np").images

    asked = [(seed, 3 + seed) for seed in range(3)]
    alone = [draw(*each) for each in asked]
    for _ in range(3):
        found = at_once(*(lambda each=each: draw(*each) for each in asked))
        for image, expected in zip(found, alone, strict=True):
            assert (image == expected).all()


@pytest.mark.skipif(not native.available(), reason="no native library")
def test_threads_that_record_the_denoiser_s_calls(monkeypatch):
    """On the reference kernel, which can be recorded on every machine with the library."""
    monkeypatch.setattr(native, "why_no_products", lambda: None)
    replays, replay = [], captured._Recording.replay
    monkeypatch.setattr(
        captured._Recording, "replay", lambda *args: (replays.append(1), replay(*args))[1]
    )
    pipeline = unet2d()
    set_backend(pipeline.unet, "reference")
    assert_drawn_alone(pipeline)
    assert len(replays) > 8


def test_a_backend_is_that_of_one_call():
    pipeline = unet2d()
    alone = [sample(pipeline, 1, STEPS), sample(pipeline, 1, STEPS, backend="reference")]
    found = at_once(
        lambda: sample(pipeline, 1, STEPS),
        lambda: sample(pipeline, 1, STEPS, backend="reference"),
        lambda: sample(pipeline, 1, STEPS),
    )
    assert all(map(torch.equal, found, [*alone, alone[0]]))


@torch.no_grad()
def test_a_copy_for_another_backend_shares_its_tensors():
    pipeline = unet2d()
    one = pipeline.unet
    x = torch.randn(1, 1, 8, 8)
    expected: Tensor = one(x, 900).sample
    other = with_backend(pipeline, "reference").unet
    assert {layer.backend for layer in layers_of(one)} == {"auto"}
    assert {name for layer in layers_of(other) for name in layer.kernel_names()} == {"reference"}
    assert torch.allclose(other(x, 900).sample, expected, atol=1e-3)
    assert torch.equal(one(x, 900).sample, expected)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
    for mine, theirs in zip(layers_of(one), layers_of(other), strict=True):
        assert mine.weight_scale.data_ptr() == theirs.weight_scale.data_ptr()
        assert mine.context is not theirs.context


RECIPES = {
    "stepquant": {"block_distillation.iterations": 2, "affine_distillation.iterations": 2},
    "training-free": {},
    "dilatequant": {"block_distillation.iterations": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_keep_nothing_of_a_call(recipe):
    arguments = ARCHITECTURES["sd"].arguments
    settings = {"calibration.trajectories": FEW["calibration.trajectories"], **RECIPES[recipe]}
    pipeline = quantize(build("sd"), recipe, steps=STEPS, settings=settings, **arguments).pipeline
    assert_drawn_alone(pipeline, times=3, **arguments)
