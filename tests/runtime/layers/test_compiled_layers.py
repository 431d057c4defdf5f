"""torch.compile over integer layers: one graph, with the numbers of eager calls."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from layer_cases import Denoiser, assert_agrees
from stepquant.quantizers import StepContext
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.simulation.packing import pack_model


@pytest.fixture
def network(simulate: Any) -> nn.Sequential:
    """A small packed model: both kinds of layers, two parts, a channel scale, a static table."""
    torch.manual_seed(2)
    second = simulate(nn.Conv2d(16, 8, 1), 4, 8, (10, 6))
    second.multiply_channel_scale(torch.linspace(0.5, 2, 16))
    return pack_model(
        nn.Sequential(
            simulate(nn.Conv2d(8, 16, 3, padding=1), 8, 8),
            nn.SiLU(),
            second,
            nn.Flatten(2),
            simulate(nn.Linear(64, 24), 4, 8, steps=1),
        )
    )


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


X = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))


def prepare(network: nn.Sequential) -> None:
    for layer in network:
        if isinstance(layer, IntegerLayer):
            layer.prepare()


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_is_one_graph_that_serves_every_step(
    network: nn.Sequential, context: StepContext
) -> None:
    prepare(network)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    results = []
    for timestep in (0, 40, 12, torch.tensor(30), torch.tensor([20, 20])):
        context.set_timestep(timestep)
        results.append(compiled(X))
        assert torch.equal(results[-1], network(X))
    assert counter.frame_count == 1
    assert not any(torch.equal(results[i], results[j]) for i in range(5) for j in range(i))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_compiled_denoiser_follows_its_timestep(
    network: nn.Sequential, context: StepContext
) -> None:
    prepare(network)
    denoiser = Denoiser(network)
    context.attach(denoiser)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(denoiser, backend=counter, fullgraph=True)
    frames = []
    for timestep in (0, 40, 20, 30, 10):
        assert torch.equal(compiled(X, torch.tensor(timestep)), denoiser(X, timestep))
        frames.append(counter.frame_count)
    assert frames[1:] == frames[1:2] * 4  # the first call may compile twice, later ones never


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_takes_mixed_batches(network: nn.Sequential, context: StepContext) -> None:
    prepare(network)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    context.set_timestep(torch.tensor([40, 10]))
    assert torch.equal(compiled(X), network(X))
    twice = torch.cat((X, X + 1))  # each row serves two neighbours
    assert torch.equal(compiled(twice), network(twice))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiling_before_the_first_call_works(network: nn.Sequential) -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, backend=counter)
    y = compiled(X)
    assert torch.equal(y, network(X))
    assert counter.frame_count <= 8  # the unpacking of weights is not traced
    assert torch.equal(compiled(X), y)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_inductor_gives_the_eager_numbers(network: nn.Sequential, context: StepContext) -> None:
    prepare(network)
    compiled = torch.compile(network, fullgraph=True)
    for timestep in (0, 40):
        context.set_timestep(timestep)
        assert_agrees(compiled(X), network(X), 1e-6)
