from __future__ import annotations

import pytest
import torch

from stepquant.models.adapter import adapter_for
from stepquant.quantizers import QuantConv2d, QuantLinear, StepContext, StepGrid
from stepquant.simulation.scheme import Override, Scheme
from stepquant.simulation.simulate import check_finite_weights, simulate
from stepquant.support.errors import StepQuantError


def twin(unet, **scheme):
    context = StepContext(StepGrid(torch.tensor([900, 400, 0])))
    model, left_float = simulate(unet, adapter_for(unet), Scheme(**scheme), context)
    return model, left_float, context


@torch.no_grad()
def output(model, timestep=400):
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return model(x, torch.as_tensor(timestep)).sample


def test_the_twin_computes_what_the_float_model_does(tiny_unet):
    unet = tiny_unet()
    model, left_float, _ = twin(unet)
    assert left_float == {}
    torch.testing.assert_close(output(model), output(unet), rtol=1e-5, atol=1e-5)


def test_the_float_model_keeps_its_modules_and_its_weights(tiny_unet):
    unet = tiny_unet()
    model, _, _ = twin(unet)
    for layer in model.modules():
        if isinstance(layer, QuantLinear | QuantConv2d):
            layer.weight.data.zero_()
    for name, value in tiny_unet().state_dict().items():
        assert torch.equal(unet.state_dict()[name], value), name
    assert not unet._forward_pre_hooks


def test_layers_have_the_bits_and_the_splits_they_should(tiny_unet):
    override = Override(pattern="mid_block.*", weight_bits=3, activation_bits=6)
    model, _, _ = twin(tiny_unet(), weight_bits=4, activation_bits=5, overrides=(override,))
    expected = {
        "conv_in": (8, 8),
        "conv_out": (8, 8),
        "time_embedding.linear_1": (4, 5),
        "mid_block.attentions.0.to_q": (3, 6),
        "up_blocks.0.resnets.1.conv1": (4, 5),
    }
    for name, (weights, activations) in expected.items():
        layer = model.get_submodule(name)
        assert (layer.weight_bits, layer.activation_bits) == (weights, activations), name
    assert model.get_submodule("up_blocks.0.resnets.1.conv1").splits == (16, 16)
    assert model.get_submodule("down_blocks.0.resnets.0.conv1").splits == (16,)


def test_the_timestep_of_every_call_chooses_the_rows(tiny_unet):
    model, _, context = twin(tiny_unet())
    for timestep, rows in ((900, [0]), (10, [2]), ([390, 880], [1, 0])):
        output(model, timestep)
        assert context.rows.tolist() == rows


def test_only_simulated_layers_are_trained(tiny_unet):
    """A norm whose weight wants a gradient where its input does not crashes torch 2.13."""
    unet = tiny_unet()
    assert unet.conv_norm_out.weight.requires_grad
    model, _, _ = twin(unet)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    simulated = {
        f"{name}.{parameter}"
        for name, layer in model.named_modules()
        if isinstance(layer, QuantLinear | QuantConv2d)
        for parameter, _ in layer.named_parameters()
    }
    assert wanted == simulated
    assert unet.conv_norm_out.weight.requires_grad


def test_a_twin_of_a_half_precision_model_is_float32(tiny_unet):
    model, _, _ = twin(tiny_unet().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_a_grouped_conv_stays_as_it_is(tiny_unet):
    unet = tiny_unet()
    unet.conv_act = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Conv2d(16, 16, 3, 1, 1, groups=4))
    model, left_float, _ = twin(unet)
    assert left_float == {"conv_act.1": "grouped conv (4 groups)"}
    assert type(model.conv_act[1]) is torch.nn.Conv2d


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv_in.weight", "mid_block.resnets.1.norm2.bias"])
def test_weights_that_are_not_finite_are_named(tiny_unet, name, bad):
    unet = tiny_unet()
    check_finite_weights(unet)
    unet.get_parameter(name).data.view(-1)[-1] = bad
    with pytest.raises(StepQuantError, match=f"parameter '{name}' holds NaN or infinity"):
        check_finite_weights(unet)
    with pytest.raises(StepQuantError, match=name):
        twin(unet)
