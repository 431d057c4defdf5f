"""Gradients of quantized layers by their input, against simulated and float layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layer_cases import input_for, layers, seeded
from stepquant.models.input_bypass import InputBypass
from stepquant.quantizers import ActivationQuantizer, QuantAttention, QuantLayer, StepContext
from stepquant.runtime.layers.integer import IntegerLayer
from stepquant.runtime.layers.weight_only import weight_only_in_place_of
from stepquant.simulation.packing import pack_attention, pack_layer
from stepquant.weight_only.config import DynamicConfig, WeightOnlyConfig

TIMES = [torch.tensor(10), torch.tensor([40, 0, 10])]


def gradient(layer: nn.Module, x: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's result, and the gradient of its product with `of` by `x`."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * of).sum().backward()
    assert x.grad is not None and x.grad.dtype == x.dtype
    return y.detach(), x.grad


def weights_for(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(6))


def simulated(simulate: Any, kind: str, bits: int, splits: Any, steps: int) -> QuantLayer:
    layer: QuantLayer = simulate(seeded(kind), bits, bits, splits, steps)
    layer.multiply_channel_scale(torch.linspace(0.5, 2.0, 12))
    return layer


@layers
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("steps", [5, 1], ids=["steps", "static"])
@pytest.mark.parametrize("timestep", TIMES, ids=["one step", "three steps"])
def test_a_packed_layer_has_the_gradient_of_its_simulation(
    kind: str, bits: int, steps: int, timestep: Tensor, simulate: Any, context: StepContext
) -> None:
    splits = (7, 5) if steps == 5 else None
    layer, x = simulated(simulate, kind, bits, splits, steps), input_for(kind)
    packed = pack_layer(layer)
    context.set_timestep(timestep)
    with torch.no_grad():
        wanted = packed(x)
    of = weights_for(wanted)
    y, found = gradient(packed, x, of)
    assert torch.equal(y, wanted)  # whether autograd follows or not
    torch.testing.assert_close(found, gradient(layer, x, of)[1], rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_has_the_dtype_of_the_input(
    dtype: torch.dtype, simulate: Any, context: StepContext
) -> None:
    packed = pack_layer(simulate(seeded("linear"), 8))
    context.set_timestep(0)
    x = input_for("linear").to(dtype)
    y, found = gradient(packed, x, weights_for(packed(x)))
    assert y.dtype == found.dtype == dtype


def test_what_the_grid_clips_has_no_gradient_in_the_layer_and_all_of_it_in_the_bypass(
    simulate: Any, context: StepContext
) -> None:
    layer: IntegerLayer = pack_layer(simulate(nn.Conv2d(1, 1, 1), 8))
    context.set_timestep(0)
    inside, outside = torch.full((1, 1, 1, 2), 0.01), torch.full((1, 1, 1, 2), 1e4)
    x = torch.cat([inside, outside], dim=-1).requires_grad_()
    error = layer.input_error(x)
    error.sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert gradient(layer, x.detach(), torch.ones(1))[1].flatten()[2:].tolist() == [0.0, 0.0]
    with torch.no_grad():
        assert torch.equal(layer.input_error(x), error)


class Denoiser(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x)


def test_the_bypass_adds_no_gradient_on_the_grid(simulate: Any, context: StepContext) -> None:
    """Straight through: what rounding loses does not depend on the sample."""
    denoiser = Denoiser(pack_layer(simulate(nn.Conv2d(1, 1, 1), 8)))
    context.attach(denoiser)
    x, of, found = torch.linspace(-0.2, 0.2, 9).view(1, 1, 3, 3), torch.ones(1), []
    for slope in (0.0, 3.0):
        InputBypass("layer").attach(denoiser, torch.full((5,), slope))
        found.append(gradient(lambda x: denoiser(x, torch.tensor(0)), x, of))
    assert not torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@layers
@pytest.mark.parametrize("config", [DynamicConfig(), WeightOnlyConfig(), WeightOnlyConfig(bits=4)])
def test_layers_without_calibration_have_the_gradient_of_their_float_weight(
    kind: str, config: WeightOnlyConfig
) -> None:
    layer, x = seeded(kind), input_for(kind)
    packed: Any = weight_only_in_place_of(layer, bits=config.bits, kinds=config.kinds)
    with torch.no_grad():
        wanted = packed(x)
        layer.weight.copy_(packed.float_weight(torch.float32))
    of = weights_for(wanted)
    y, found = gradient(packed, x, of)
    assert torch.equal(y, wanted)
    torch.testing.assert_close(found, gradient(layer, x, of)[1], rtol=1e-4, atol=1e-5)


def test_a_dynamic_layers_bias_is_trained() -> None:
    layer: Any = weight_only_in_place_of(seeded("linear"), kinds=DynamicConfig.kinds)
    layer.bias.requires_grad_()
    layer(input_for("linear")).sum().backward()
    assert layer.bias.grad.tolist() == [15.0] * 8


def attention(context: StepContext, log2: bool) -> QuantAttention:
    built = QuantAttention(8, 8, context)
    built.resize(5)
    for quantizer in built.activation_quantizers:
        assert isinstance(quantizer, ActivationQuantizer)
        quantizer.scale.data.fill_(4 / 255)
        quantizer.zero_point.data.fill_(128.0)
    built.probabilities.log2[:] = log2
    built.probabilities.scale.data.fill_(1.0 if log2 else 1 / 255)
    built.quantizing = True
    return built


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("log2", [False, True])
def test_packed_products_have_the_gradient_of_their_simulation(
    context: StepContext, log2: bool, masked: bool
) -> None:
    built = attention(context, log2)
    packed = pack_attention(built)
    context.set_timestep(20)
    generator = torch.Generator().manual_seed(3)
    operands = [torch.randn(2, 2, n, 8, generator=generator) for n in (5, 7, 7)]
    mask = torch.zeros(2, 1, 1, 7).index_fill(3, torch.tensor([6]), -torch.inf) if masked else None
    with torch.no_grad():
        wanted = packed(*operands, mask)
    found = []
    for module in (packed, built):
        given = [each.clone().requires_grad_() for each in operands]
        y = module(*given, mask)
        (y * weights_for(y)).sum().backward()
        found.append([y.detach(), *(each.grad for each in given)])
    assert torch.equal(found[0][0], wanted)
    for mine, simulations in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(mine, simulations, rtol=1e-4, atol=1e-5)
        assert mine.abs().max() > 1e-3
