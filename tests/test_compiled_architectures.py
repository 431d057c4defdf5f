"""Quantized transformers of diffusers under `torch.compile`: one graph, and the eager numbers."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch._dynamo.testing import CompileCounterWithBackend

from architectures import ARCHITECTURES, build
from stepquant.api import DynamicConfig, WeightOnlyConfig, quantize, set_backend
from stepquant.methods import TemporalQuantizer
from stepquant.methods.recipe import Recipe
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import named_arguments
from stepquant.runtime.layers.integer import IntegerLayer

TRANSFORMERS = ["dit", "pixart", "sd3", "flux"]
FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}
STEPWISE = Recipe(name="stepwise", description="A scale a step.", steps=(TemporalQuantizer(),))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def packed(name):
    """The denoiser, laid out for its kernels, and a call of it: `(denoiser, sample, arguments)`."""
    architecture = ARCHITECTURES[name]
    result = quantize(build(name), STEPWISE, 8, 8, None, 3, FEW, **architecture.arguments)
    denoiser = getattr(result.pipeline, architecture.component)
    for module in denoiser.modules():
        if isinstance(module, IntegerLayer):
            module.prepare()
    sample, _, conditions = adapter_for(denoiser).random_inputs(denoiser, 2)
    return denoiser, sample, named_arguments(denoiser, conditions)


def timesteps(name, denoiser):
    """One for both samples, as pipelines expand it, at each calibrated step."""
    grid = denoiser.step_grid
    whole = name in ("dit", "pixart")
    return [(at.long() if whole else at).expand(2) for at in grid]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_one_graph_serves_every_step(name):
    denoiser, sample, arguments = packed(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(denoiser, backend=counter, fullgraph=True)
    found, frames = [], []
    for at in timesteps(name, denoiser):
        found.append(compiled(sample, timestep=at, **arguments)[0])
        wanted = denoiser(sample, timestep=at, **arguments)[0]
        torch.testing.assert_close(found[-1], wanted, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    # The first call may compile twice, later ones never.
    assert frames[0] <= 2 and frames == frames[:1] * len(frames)
    assert not torch.equal(found[0], found[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "flux"])
@torch.no_grad()
def test_samples_at_steps_of_their_own_are_one_graph_too(name):
    """As Flux hands its timesteps over: a number for each sample, that are alike or not."""
    denoiser, sample, arguments = packed(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(denoiser, backend=counter, fullgraph=True)
    first, *_, last = timesteps(name, denoiser)
    frames = []
    for at in (torch.stack([first[0], last[0]]), torch.stack([last[0], last[0]])):
        found = compiled(sample, timestep=at, **arguments)[0]
        wanted = denoiser(sample, timestep=at, **arguments)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] <= 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_inductor_gives_the_eager_prediction():
    """Fused float operations round elsewhere, and a code may fall on the other side of a half."""
    denoiser, sample, arguments = packed("dit")
    compiled = torch.compile(denoiser, fullgraph=True)
    for at in timesteps("dit", denoiser)[:2]:
        found = compiled(sample, timestep=at, **arguments)[0]
        wanted = denoiser(sample, timestep=at, **arguments)[0]
        assert float((found - wanted).square().mean() / wanted.square().mean()) < 1e-4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled")
    build("sd").save_pretrained(folder / "float")
    arguments = {"steps": 2, "settings": FEW, **ARCHITECTURES["sd"].arguments}
    quantize(build("sd"), "minmax", 8, 8, out=folder / "integer", **arguments)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["integer", "dynamic", "weight-only"])
@pytest.mark.parametrize("way", ["whole", "in place", "repeated blocks"])
@torch.no_grad()
def test_a_loaded_denoiser_is_one_graph_before_its_first_call(folders, kind, way):
    """Integer and dynamic layers are laid out by `set_backend`; weight-only ones have no layout."""
    configs = {"dynamic": DynamicConfig(), "weight-only": WeightOnlyConfig()}
    more = {"quantization_config": configs[kind]} if kind in configs else {}
    source = folders / ("float" if kind in configs else kind)
    load = partial(UNet2DConditionModel.from_pretrained, source, subfolder="unet", **more)
    unet = load()
    set_backend(unet, "auto")
    called = unet
    if way == "whole":
        called = torch.compile(unet, fullgraph=True, backend="eager")
    elif way == "in place":
        unet.compile(fullgraph=True, backend="eager")
    else:
        unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(shape, generator=generator) for shape in [(2, 4, 8, 8), (2, 8, 16)])
    found = called(x, torch.tensor(10), text).sample
    torch.testing.assert_close(found, load()(x, torch.tensor(10), text).sample)
