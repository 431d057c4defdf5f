"""NaN and infinity: where the float model gives NaN, quantized ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import Tensor, nn

from architectures import ARCHITECTURES, build
from fast_models import packed
from layer_cases import input_for, layers, seeded
from stepquant.api import DynamicConfig, WeightOnlyConfig
from stepquant.models.adapter import adapter_for
from stepquant.models.calling import call_denoiser
from stepquant.models.non_finite import let_through
from stepquant.quantizers import QuantAttention, StepContext
from stepquant.runtime.layers.weight_only import weight_only_in_place_of
from stepquant.runtime.ops import native
from stepquant.simulation.packing import pack_attention, pack_layer

BAD = [float("nan"), float("inf"), -float("inf")]

pytestmark = pytest.mark.usefixtures("one_thread")


def bad_samples(y: Tensor) -> list[bool]:
    """Which samples are NaN throughout; none is so in part."""
    nan = torch.isnan(y.flatten(1))
    assert torch.equal(nan.any(dim=1), nan.all(dim=1))
    return nan.any(dim=1).tolist()


@torch.no_grad()
def prediction(model: nn.Module, bad: float | None, where: str) -> Tensor:
    """Of two samples; the second one's input is `bad` in one place."""
    sample, at, conditions = adapter_for(model).random_inputs(model, 2)
    if bad is not None:
        texts = [v for k, v in conditions.items() if k == "encoder_hidden_states"]
        target = sample if where == "sample" else texts[0]
        target[1].view(-1)[3] = bad
    return call_denoiser(model, sample, at, conditions)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["sample", "text"])
@pytest.mark.parametrize("name", ["sd", "pixart", "sd3"])
def test_a_packed_denoiser_gives_nan_where_the_float_one_does(
    name: str, where: str, bad: float
) -> None:
    float_model = getattr(build(name), ARCHITECTURES[name].component)
    fast = packed(name, bits=4)
    good = prediction(fast, None, where)
    found = prediction(fast, bad, where)
    assert torch.isnan(prediction(float_model, bad, where)[1]).any()
    assert bad_samples(found) == [False, True]
    assert torch.equal(found[0], good[0])  # the other sample is what it was, bit for bit


@pytest.mark.parametrize("config", [DynamicConfig(), WeightOnlyConfig(bits=4)])
def test_so_do_models_that_are_quantized_at_load(config: Any, tmp_path: Any) -> None:
    build("sd").save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
    unet = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping).unet
    for bad in BAD:
        found = prediction(unet, bad, "sample")
        assert torch.isnan(found[1]).any() and torch.isfinite(found[0]).all()


@layers
@pytest.mark.parametrize("bad", BAD)
@torch.no_grad()
def test_a_dynamic_layer_lets_it_through(kind: str, bad: float) -> None:
    layer = weight_only_in_place_of(seeded(kind), kinds=DynamicConfig.kinds)
    x = input_for(kind)
    wanted = layer(x)
    x[1].view(-1)[5] = bad
    found = layer(x)
    assert torch.isnan(found[1]).any()
    assert torch.equal(found[[0, 2]], wanted[[0, 2]])


@layers
@pytest.mark.parametrize("bad", BAD)
@torch.no_grad()
def test_a_packed_layer_of_torch_operations_lets_it_through(
    kind: str, bad: float, simulate: Any, context: StepContext, monkeypatch: Any
) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    layer, x = pack_layer(simulate(seeded(kind), 4)), input_for(kind)
    for timestep in (torch.tensor(10), torch.tensor([40, 0, 10])):
        context.set_timestep(timestep)
        wanted, broken = layer(x), x.clone()
        broken[1].view(-1)[5] = bad
        found = layer(broken)
        assert bad_samples(found) == [False, True, False]
        assert torch.equal(found[[0, 2]], wanted[[0, 2]])


def test_finite_values_whose_sum_is_not_stay_what_they_are() -> None:
    x = torch.full((2, 8), 3e38)
    y = torch.arange(6.0).view(2, 3)
    assert let_through(y, x) is not None and torch.equal(let_through(y, x), y)
    x[0, 0] = torch.nan
    assert bad_samples(let_through(y, x)) == [True, False]


@pytest.mark.parametrize("operand", range(3))
@pytest.mark.parametrize("bad", BAD)
@torch.no_grad()
def test_quantized_products_let_it_through(operand: int, bad: float, context: StepContext) -> None:
    built = QuantAttention(8, 8, context)
    built.resize(5)
    built.quantizing = True
    attention = pack_attention(built)
    context.set_timestep(20)
    operands = [torch.randn(2, 2, 5, 8) for _ in range(3)]
    wanted = attention(*operands)
    operands[operand][1, 0, 2, 3] = bad
    found = attention(*operands)
    assert torch.isnan(found[1, 0]).any()
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1, 1], wanted[1, 1])
