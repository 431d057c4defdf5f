from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stepquant.numerics import unpack_bits
from stepquant.quantizers import QuantLayer
from stepquant.runtime.layers.integer import IntegerConv2d, IntegerLinear
from stepquant.runtime.ops.layer_spec import LayerSpec
from stepquant.simulation.packing import layer_spec, pack_layer, pack_model
from stepquant.support.errors import StepQuantError


def conv() -> nn.Conv2d:
    torch.manual_seed(1)
    return nn.Conv2d(12, 8, (5, 3), (1, 2), (2, 1))


def test_layer_spec_describes_a_linear_layer(simulate: Any) -> None:
    assert layer_spec(simulate(nn.Linear(12, 8), 4, 7)) == LayerSpec("linear", 12, 8, 4, 7)


def test_layer_spec_describes_a_conv(simulate: Any) -> None:
    expected = LayerSpec("conv2d", 12, 8, 3, 8, (5, 3), (1, 2), (2, 1), (1, 1))
    assert layer_spec(simulate(conv(), 3)) == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("splits", [(12,), (7, 5)], ids=str)
def test_weights_take_their_true_number_of_bits(
    bits: int, splits: tuple[int, ...], simulate: Any
) -> None:
    layer = simulate(conv(), bits, splits=splits)
    packed = pack_layer(layer)
    streams = [(8 * channels * 15 * bits + 7) // 8 for channels in splits]
    assert packed.weight_packed.dtype == torch.uint8
    assert packed.weight_packed.numel() == sum(streams)
    start = 0
    for index, (size, weight) in enumerate(zip(streams, layer.weight_parts(), strict=True)):
        stream = packed.weight_packed[start : start + size]
        codes = layer.weight_quantizers[index].codes(weight)
        assert torch.equal(unpack_bits(stream, bits, codes.numel()), codes.flatten())
        start += size


@pytest.mark.parametrize("splits", [(12,), (7, 5)], ids=str)
def test_scales_tables_and_bias_are_the_simulations(splits: tuple[int, ...], simulate: Any) -> None:
    layer = simulate(conv(), 4, splits=splits)
    layer.activation_quantizers[0].zero_point.data.add_(0.3)  # trained: no whole number
    packed = pack_layer(layer)
    for index in range(len(splits)):
        weights, inputs = layer.weight_quantizers[index], layer.activation_quantizers[index]
        assert torch.equal(packed.weight_scale[index], weights.scale)
        assert torch.equal(packed.weight_zero_point[index].float(), weights.zero_point)
        assert torch.equal(packed.act_scale[index], inputs.scale)
        assert torch.equal(packed.act_zero_point[index].float(), inputs.zero_point.round())
    assert torch.equal(packed.bias, layer.bias)
    assert packed.act_channel_scale is None
    assert packed.context is layer.context
    assert not any(value.requires_grad for value in packed.state_dict().values())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("splits", [(12,), (7, 5)], ids=str)
def test_the_packed_weight_is_the_simulated_one(
    bits: int, splits: tuple[int, ...], simulate: Any
) -> None:
    layer = simulate(conv(), bits, splits=splits)
    assert torch.equal(pack_layer(layer).float_weight(), layer.quantized_weight())


def test_a_static_part_beside_one_with_a_table_serves_every_step(simulate: Any) -> None:
    layer = simulate(conv(), splits=(7, 5))
    layer.activation_quantizers[1].resize(1)
    packed = pack_layer(layer)
    assert packed.act_scale.shape == (2, 5)
    assert torch.equal(packed.act_scale[1], layer.activation_quantizers[1].scale.expand(5))
    x = torch.randn(2, 12, 7, 5)
    layer.context.set_timestep(30)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)


def test_the_channel_scale_comes_back_bit_by_bit(simulate: Any) -> None:
    """The simulation multiplies with the very inverse that the runtime makes of what is stored."""
    layer = simulate(nn.Linear(4096, 2, bias=False))
    layer.multiply_channel_scale(torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.1)
    layer.multiply_channel_scale(torch.rand(4096, generator=torch.Generator().manual_seed(1)) + 0.1)
    assert torch.equal(1.0 / pack_layer(layer).act_channel_scale, layer.inverse_channel_scale)


@pytest.mark.parametrize("zero_point", [-1.0, 256.0, 1e6, float("nan")])
def test_an_activation_zero_point_off_the_grid_is_refused(zero_point: float, simulate: Any) -> None:
    layer = simulate(nn.Linear(12, 8))
    layer.activation_quantizers[0].zero_point.data[2] = zero_point
    with pytest.raises(StepQuantError, match=r"activation zero points lie in .*expected 0\.\.255"):
        pack_layer(layer)


def test_a_weight_zero_point_off_the_grid_is_refused(simulate: Any) -> None:
    layer = simulate(nn.Linear(12, 8), 4)
    layer.weight_quantizers[0].zero_point.data[2] = 16
    with pytest.raises(StepQuantError, match=r"weight zero points .*expected 0\.\.15 for 4 bits"):
        pack_layer(layer)


def test_an_8_bit_weight_that_is_not_symmetric_is_refused(simulate: Any) -> None:
    """With zero point 127 the difference of code 255 would be 128, which int8 cannot hold."""
    layer = simulate(nn.Linear(12, 8), 8)
    layer.weight_quantizers[0].zero_point.data[2] = 127
    with pytest.raises(StepQuantError, match=r"127\.\.128: expected 128\.\.128 for 8 bits"):
        pack_layer(layer)


def test_pack_model_replaces_every_simulated_layer(simulate: Any) -> None:
    model = nn.Sequential(simulate(conv()), nn.Sequential(nn.SiLU(), simulate(nn.Linear(3, 8))))
    activation = model[1][0]
    assert pack_model(model) is model
    assert isinstance(model[0], IntegerConv2d) and isinstance(model[1][1], IntegerLinear)
    assert model[1][0] is activation
    assert not any(isinstance(module, QuantLayer) for module in model.modules())
    assert not sum(parameter.numel() for parameter in model.parameters())


def test_packing_leaves_the_simulation_as_it_was(simulate: Any) -> None:
    layer = simulate(conv(), 4)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    packed = pack_layer(layer)
    for value in packed.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
