"""One model, many threads: the bits that each call gives on its own."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from concurrent_calls import at_once, meeting
from fast_models import TABLES, packed
from packed_models import packed_unet, unet
from recorded_models import inputs
from stepquant.models.input_bypass import InputBypass
from stepquant.runtime.layers.dynamic import Dynamic
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.lora_branch import LoraBranch, attach_branch
from stepquant.runtime.layers.resident import set_memory_mode
from stepquant.runtime.layers.weight_only import WeightOnly
from stepquant.weight_only.config import DynamicConfig, WeightOnlyConfig
from stepquant.weight_only.model import put_layers, resolved_at_load

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = [0, 225, 450, 675, 900]  # of `packed_unet`


def unet2d(**changes: object) -> tuple[nn.Module, Callable[..., tuple], list[str]]:
    model = packed_unet(attention=True, step_bias=True, bypass=True, **changes)

    def given(batch: int, seed: int, step: int) -> tuple[Tensor, dict]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 1, 8, 8, generator=generator), {"timestep": STEP[step]}

    return model, given, ["down_blocks.1", "mid_block", "up_blocks.1"]


def of_architecture(name: str, layer: str, places: list[str]):
    def build() -> tuple[nn.Module, Callable[..., tuple], list[str]]:
        model = packed(name, TABLES)
        InputBypass(layer).attach(model, torch.linspace(1, 20, 3))
        return model, lambda batch, seed, step: inputs(model, batch, seed, step % 3), places

    build.__name__ = name
    return build


MODELS = [
    unet2d,
    of_architecture("sd", "conv_in", ["down_blocks.1", "mid_block", "up_blocks.1"]),
    of_architecture("dit", "pos_embed.proj", ["transformer_blocks.0", "transformer_blocks.1"]),
]


def call(model: nn.Module, given: tuple[Tensor, dict]) -> Tensor:
    with torch.no_grad():
        found = model(given[0], **given[1])
    return found if isinstance(found, Tensor) else found[0]


def assert_alone(model: nn.Module, found: list[Tensor], asked: list[tuple]) -> None:
    """Each of `found` has the bits that a call on its own gives."""
    for y, given in zip(found, asked, strict=True):
        assert torch.equal(y, call(model, given))


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("batches", [(1, 1), (3, 2)], ids=["alike", "other-batches"])
def test_calls_that_meet_in_the_middle(build, batches):
    model, given, places = build()
    asked = [given(batch, seed, seed * 2) for seed, batch in enumerate(batches)]
    with meeting(model, places):
        found = at_once(*(lambda each=each: call(model, each) for each in asked))
    assert_alone(model, found, asked)
    moved = given(batches[0], 0, 2)  # the steps matter, or else nothing was shown
    assert not torch.equal(found[0], call(model, moved))


def test_samples_at_steps_of_their_own_beside_a_call_at_one():
    model, given, places = unet2d()
    mixed = (given(3, 5, 0)[0], {"timestep": torch.tensor([0, 900, 450])})
    asked = [mixed, given(3, 6, 1)]
    with meeting(model, places):
        found = at_once(*(lambda each=each: call(model, each) for each in asked))
    assert_alone(model, found, asked)


@pytest.mark.parametrize("mode", ["fast", "low"])
def test_the_first_calls_lay_each_weight_out_once(mode, monkeypatch):
    model, given, _ = unet2d()
    set_memory_mode(model, mode)
    expected, asked = copy.deepcopy(model), [given(1 + number, number, number) for number in (0, 1)]
    laid_out, prepare = [], IntegerLayer.prepare
    monkeypatch.setattr(
        IntegerLayer, "prepare", lambda self: (laid_out.append(self), prepare(self))[1]
    )
    found = at_once(*(lambda each=each: call(model, each) for each in asked))
    layers = [module for module in model.modules() if isinstance(module, IntegerLayer)]
    assert sorted(map(id, laid_out)) == sorted(map(id, layers))
    monkeypatch.undo()
    assert_alone(expected, found, asked)


def test_a_pool_of_threads():
    model, given, _ = unet2d()
    draw = random.Random(0)
    asked = [given(draw.choice([1, 2, 3]), seed, draw.randrange(5)) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda each: call(model, each), asked))
    assert_alone(model, found, asked)


@pytest.mark.parametrize("in_threads", [False, True], ids=["tasks", "to_thread"])
def test_asyncio(in_threads):
    model, given, _ = unet2d()
    asked = [[given(1, 10 * task + n, (task + n) % 5) for n in range(4)] for task in range(3)]

    async def sampler(steps: list[tuple]) -> list[Tensor]:
        found = []
        for each in steps:
            found.append(
                await asyncio.to_thread(call, model, each) if in_threads else call(model, each)
            )
            await asyncio.sleep(0)
        return found

    async def all_samplers() -> list[list[Tensor]]:
        return await asyncio.gather(*map(sampler, asked))

    for found, steps in zip(asyncio.run(all_samplers()), asked, strict=True):
        assert_alone(model, found, steps)


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_a_hook_that_calls_the_model(build):
    model, given, places = build()
    outer, inner = given(2, 0, 0), given(1, 1, 2)
    expected, found = [call(model, each) for each in (outer, inner)], []

    def again(*_: object) -> None:
        if not found:
            found.append(None)
            found[0] = call(model, inner)

    handle = model.get_submodule(places[0]).register_forward_pre_hook(again)
    assert torch.equal(call(model, outer), expected[0])
    handle.remove()
    assert torch.equal(found[0], expected[1])


def test_a_call_that_fails_changes_no_other():
    model, given, places = unet2d()
    first, second = given(2, 0, 0), given(1, 1, 4)
    expected = [call(model, each) for each in (first, second)]

    def attempt(*_: object) -> None:
        handle.remove()
        inner = model.get_submodule(places[-1]).register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            call(model, second)
        inner.remove()

    handle = model.get_submodule(places[0]).register_forward_pre_hook(attempt)
    assert torch.equal(call(model, first), expected[0])
    assert torch.equal(call(model, second), expected[1])
    bypass = next(m.bypass for m in model.modules() if getattr(m, "bypass", None) is not None)
    assert bypass._here.state.value is None and bypass._here.state._calls is None


@pytest.mark.parametrize(
    "config",
    [WeightOnlyConfig(), WeightOnlyConfig(bits=4), DynamicConfig()],
    ids=["w8", "w4", "dynamic"],
)
def test_layers_quantized_at_load(config):
    model: UNet2DModel = unet()
    put_layers(model, resolved_at_load(config, model))
    layers = [m for m in model.modules() if isinstance(m, WeightOnly)]
    assert len(layers) > 20 and all(
        isinstance(m, Dynamic) == (config.bits == 8 and "Dynamic" in type(config).__name__)
        for m in layers
    )
    x = [torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 3)]
    asked = [(each, {"timestep": at}) for each, at in zip(x, (900, 0), strict=True)]
    with meeting(model, ["mid_block"]):  # whose layers both lay out in the first call
        found = at_once(*(lambda each=each: call(model, each) for each in asked))
    assert_alone(model, found, asked)


def test_lora_branches():
    model, given, places = unet2d()
    for name in ("conv_in", "mid_block.attentions.0.to_q"):
        layer = model.get_submodule(name)
        shape = layer.spec.weight_shape
        A = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(0))
        B = torch.randn(shape[0], 2, *(1,) * (len(shape) - 2))
        attach_branch(layer, "one", LoraBranch(A, B, 0.5, 1.0))
    asked = [given(1, 0, 0), given(3, 1, 4)]
    with meeting(model, places):
        found = at_once(*(lambda each=each: call(model, each) for each in asked))
    assert_alone(model, found, asked)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("part", ["", "mid_block"], ids=["model", "block"])
def test_a_compiled_model_or_block(part):
    model, given, _ = unet2d()
    eager = copy.deepcopy(model)
    model.get_submodule(part).compile(backend="eager")
    asked = [given(1, seed, step) for seed, step in enumerate((0, 4))]
    asked = [(x, {"timestep": torch.tensor(more["timestep"])}) for x, more in asked]
    alone = [call(model, each) for each in asked]
    for found, each in zip(alone, asked, strict=True):
        torch.testing.assert_close(found, call(eager, each))
    calls = [lambda each=each: [call(model, each) for _ in range(4)] for each in asked]
    for found, expected in zip(at_once(*calls), alone, strict=True):
        assert all(torch.equal(y, expected) for y in found)
