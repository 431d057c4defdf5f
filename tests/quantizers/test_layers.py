from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stepquant.quantizers import QuantConv2d, QuantLayer, QuantLinear, StepContext
from stepquant.support.errors import StepQuantError

GEOMETRIES: dict[str, dict[str, Any]] = {
    "conv1x1": {"kernel_size": 1},
    "conv3x3": {"kernel_size": 3, "padding": 1},
    "conv5x3-stride-1-2": {"kernel_size": (5, 3), "padding": (2, 1), "stride": (1, 2)},
    "conv3x3-dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "bias": False},
}


def seeded(build: Any) -> nn.Module:
    torch.manual_seed(1)
    return build()


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "linear-no-bias": lambda: nn.Linear(12, 8, bias=False),
    **{
        name: lambda geometry=geometry: nn.Conv2d(12, 8, **geometry)
        for name, geometry in GEOMETRIES.items()
    },
}
layers = pytest.mark.parametrize("build", LAYERS.values(), ids=LAYERS)


def input_of(layer: nn.Module, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    is_linear = isinstance(layer, nn.Linear | QuantLinear)
    return torch.randn((batch, 5, 12) if is_linear else (batch, 12, 7, 5), generator=generator)


def float64_formula(layer: QuantLayer, x: Tensor, rows: list[int]) -> Tensor:
    """`y = s[t] s_o sum (q_x - z[t]) (q_w - z_o) + bias` (DESIGN section 5), sample by sample."""
    results = []
    weight, largest_input = layer.weight.detach().double(), 2**layer.activation_bits - 1
    for sample, row in zip(x.double(), rows, strict=True):
        total: Tensor | float = 0.0
        start = 0
        for index, channels in enumerate(layer.splits):
            inputs, weights = layer.activation_quantizers[index], layer.weight_quantizers[index]
            part = slice(start, start + channels)
            part_x = sample[..., part] if isinstance(layer, QuantLinear) else sample[part]
            scale = inputs.scale.detach().double()[row]
            zero = inputs.zero_point.detach().double().round()[row]
            codes_x = ((part_x / scale).round() + zero).clamp(0, largest_input)
            per_channel = (-1,) + (1,) * (weight.dim() - 1)
            scale_w = weights.scale.detach().double().view(per_channel)
            zero_w = weights.zero_point.detach().double().round().view(per_channel)
            codes_w = (weight[:, part] / scale_w).round() + zero_w
            codes_w = codes_w.clamp(0, 2**layer.weight_bits - 1)
            if isinstance(layer, QuantConv2d):
                product = functional.conv2d(
                    (codes_x - zero)[None],
                    codes_w - zero_w,
                    None,
                    layer.stride,
                    layer.padding,
                    layer.dilation,
                )[0]
                total = total + scale * scale_w.view(-1, 1, 1) * product
            else:
                total = total + scale * scale_w.view(-1) * ((codes_x - zero) @ (codes_w - zero_w).T)
            start += channels
        if layer.bias is not None:
            bias = layer.bias.detach().double()
            total = total + (bias if isinstance(layer, QuantLinear) else bias.view(-1, 1, 1))
        results.append(total)
    return torch.stack(results)


@layers
def test_float_mode_is_the_float_layer(build: Any, context: StepContext) -> None:
    layer = seeded(build)
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    quantized = kind(layer, 4, 4, context)
    assert not quantized.quantizing
    assert torch.equal(quantized(input_of(layer)), layer(input_of(layer)))


@layers
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 8), (2, 4), (1, 7)])
@pytest.mark.parametrize("splits", [None, (7, 5)], ids=["one-part", "two-parts"])
def test_quantizing_is_the_formula_of_the_design(
    build: Any,
    weight_bits: int,
    activation_bits: int,
    splits: tuple[int, ...] | None,
    simulate: Any,
) -> None:
    layer = simulate(seeded(build), weight_bits, activation_bits, splits)
    x, rows = input_of(layer), [2, 0, 4]
    layer.context.rows = torch.tensor(rows)
    expected = float64_formula(layer, x, rows)
    torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # another path: whole numbers first, scales after
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-6)


@layers
def test_every_step_has_its_own_result(build: Any, simulate: Any) -> None:
    layer = simulate(seeded(build), 4, 4)
    x, results = input_of(layer), []
    for timestep in (0, 10, 20, 30, 40):
        layer.context.set_timestep(timestep)
        results.append(layer(x))
    assert not any(torch.equal(results[i], results[j]) for i in range(5) for j in range(i))


@layers
@pytest.mark.parametrize("quantizing", [True, False], ids=["quantizing", "float"])
def test_split_inputs_give_the_sum_of_two_layers(
    build: Any, quantizing: bool, simulate: Any
) -> None:
    whole = simulate(seeded(build), 4, 8, (7, 5), quantizing=quantizing)
    whole.activation_quantizers[1].scale.data.mul_(3)
    whole.context.set_timestep(20)
    x = input_of(whole)
    total: Tensor | float = 0.0
    pairs = zip(x.split((7, 5), dim=whole.channel_dim), whole.weight_parts(), strict=True)
    for index, (part_x, weight) in enumerate(pairs):
        layer = seeded(build)
        layer.weight = nn.Parameter(weight.detach().clone())
        if index == 1:
            layer.bias = None
        part = simulate(layer, 4, 8, quantizing=quantizing)
        part.activation_quantizers[0] = whole.activation_quantizers[index]
        total = total + part(part_x)
    torch.testing.assert_close(whole(x), total, rtol=1e-5, atol=1e-5)


@layers
def test_a_channel_scale_is_undone_by_the_weight(build: Any, simulate: Any) -> None:
    layer = simulate(seeded(build), quantizing=False)
    x = input_of(layer)
    expected = layer(x)
    scale = torch.rand(12, generator=torch.Generator().manual_seed(8)) * 4 + 0.1
    for _ in range(2):  # a second scaling comes on top of the first
        layer.weight.data.mul_(scale.view(1, -1, *(1,) * (layer.weight.dim() - 2)))
        layer.multiply_channel_scale(scale)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.inverse_channel_scale, 1 / scale**2)


@layers
def test_the_input_is_scaled_before_it_is_quantized(build: Any, simulate: Any) -> None:
    layer = simulate(seeded(build), 8, 4, (7, 5))
    scale = 2.0 ** torch.arange(-6, 6)
    x, shape = input_of(layer), [1] * input_of(layer).dim()
    shape[layer.channel_dim] = -1
    expected = layer(x / scale.view(shape))
    layer.multiply_channel_scale(scale)
    assert torch.equal(layer(x), expected)


def test_a_loaded_channel_scale_is_used(simulate: Any) -> None:
    scaled, plain = simulate(nn.Linear(12, 8)), simulate(nn.Linear(12, 8))
    scaled.multiply_channel_scale(torch.arange(1.0, 13.0))
    plain.load_state_dict(scaled.state_dict())
    x = input_of(plain)
    assert torch.equal(plain(x), scaled(x))


@layers
def test_everything_that_is_trained_gets_a_gradient(build: Any, simulate: Any) -> None:
    layer = simulate(seeded(build), 4, 3, (7, 5))
    for quantizer in layer.weight_quantizers:
        quantizer.scale.data.mul_(0.8)  # so that some weights saturate, as some inputs do
    layer.context.rows = torch.tensor([2, 0, 4])
    x = (3 * input_of(layer)).requires_grad_()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() > 0, name
    assert x.grad is not None and x.grad.count_nonzero() > 0


def test_the_float_layer_is_not_touched(simulate: Any) -> None:
    layer = nn.Linear(12, 8)
    before = copy.deepcopy(layer.state_dict())
    quantized = simulate(layer)
    quantized.weight.data.zero_()
    quantized.bias.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_parts_that_do_not_add_up_are_refused(context: StepContext) -> None:
    with pytest.raises(StepQuantError, match=r"\(7, 4\) add up to 11 channels: expected 12"):
        QuantLinear(nn.Linear(12, 8), 8, 8, context, (7, 4))


@pytest.mark.parametrize(("bits", "what"), [((9, 8), "weight"), ((8, 0), "activation")])
def test_bits_are_checked(bits: tuple[int, int], what: str, context: StepContext) -> None:
    with pytest.raises(StepQuantError, match=f"{what} bits is"):
        QuantConv2d(nn.Conv2d(4, 4, 3), *bits, context)


def test_a_bias_of_the_step_is_the_same_with_and_without_gradients(simulate):
    layer = simulate(nn.Conv2d(3, 4, 3, padding=1), 8, 8)
    step_bias = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    layer.set_step_bias(step_bias)
    layer.context.set_timestep(torch.tensor([30.0, 0.0]))
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        integers = layer(x)
    trained = layer(x)
    torch.testing.assert_close(trained.detach(), integers, rtol=1e-4, atol=1e-4)
    trained.sum().backward()
    assert layer.bias.grad is not None
    layer.step_bias = None
    with torch.no_grad():
        torch.testing.assert_close(
            integers - layer(x), step_bias[[3, 0]].view(2, 4, 1, 1).expand(2, 4, 6, 6)
        )


def test_a_static_layer_gets_a_row_for_each_step_with_its_bias(context):
    layer = QuantConv2d(nn.Conv2d(3, 4, 3), 8, 8, context)
    layer.activation_quantizers[0].scale.data.fill_(0.25)
    layer.set_step_bias(torch.zeros(5, 4))
    assert layer.activation_quantizers[0].scale.tolist() == [0.25] * 5


def test_a_simulated_linear_tells_its_sizes_as_the_layer_did(simulate):
    layer = simulate(nn.Linear(5, 3))
    assert (layer.in_features, layer.out_features) == (5, 3)
