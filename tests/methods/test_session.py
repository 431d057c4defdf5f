from __future__ import annotations

import pytest
import torch

from stepquant.methods import TemporalQuantizer
from stepquant.methods.session import check_finite_weights, simulate
from stepquant.models.adapter import adapter_for
from stepquant.quantizers import QuantConv2d, QuantLinear, StepContext, StepGrid
from stepquant.simulation.scheme import Override, Scheme
from stepquant.support.errors import StepQuantError
from stepquant.support.work_folder import WorkFolder


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


def test_ranges_are_made_once(tiny_session, monkeypatch):
    session = tiny_session()
    calls = []
    monkeypatch.setattr(
        "stepquant.methods.session.initialize_ranges", lambda *args: calls.append(args[2:6])
    )
    session.ensure_ranges()
    session.ensure_ranges()
    assert calls == [("minmax", "minmax", 0, session.samples_per_step)]
    assert session.ranges_ready


def test_ranges_quantize_every_layer(tiny_session):
    session = tiny_session(weights=4, activations=4)
    before = output(session.model)
    assert not any(layer.quantizing for layer in session.layers().values())
    session.require_no_ranges("any")
    session.ensure_ranges()
    assert all(layer.quantizing for layer in session.layers().values())
    after = output(session.model)
    assert not torch.allclose(before, after, rtol=0.01, atol=0.01)
    with pytest.raises(StepQuantError, match="step 'any' comes after one that needs ranges"):
        session.require_no_ranges("any")


def test_kept_ranges_are_taken_up_bit_by_bit(tiny_session, tmp_path, monkeypatch):
    def session(resume):
        made = tiny_session(work=WorkFolder(tmp_path / "work", {"a": 1}, resume))
        TemporalQuantizer().apply(made)
        made.layers()["conv_out"].multiply_channel_scale(torch.linspace(0.5, 2, 16))
        return made

    first = session(False)
    first.ensure_ranges()
    monkeypatch.setattr("stepquant.methods.session.initialize_ranges", None)  # must not be called
    again = session(True)
    again.ensure_ranges()
    assert again.ranges_ready
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert torch.equal(output(again.model), output(first.model))


def test_image_gradients_are_measured_once_and_kept(tiny_session, tmp_path, monkeypatch):
    session = tiny_session(steps=4, work=WorkFolder(tmp_path / "work", {}, False))
    found = session.image_gradients()
    assert found.shape == (4, 2, 1, 16, 16)
    again = tiny_session(steps=4, work=WorkFolder(tmp_path / "work", {}, True))
    monkeypatch.setattr("stepquant.methods.session.image_gradients", None)
    assert torch.equal(session.image_gradients(), found)
    assert torch.equal(again.image_gradients(), found)


def test_influence_is_one_in_the_mean_and_more_even_at_a_lower_exponent(tiny_session):
    session = tiny_session(steps=5)
    spread = []
    for exponent in (1.0, 0.5):
        weights = session.influence(exponent)
        assert weights.shape == (5, 16, 16)
        assert float(weights.mean()) == pytest.approx(1)
        assert (weights > 0).all()
        spread.append(float(weights.max() / weights.min()))
    assert spread[1] == pytest.approx(spread[0] ** 0.5, rel=1e-3)
    assert all(parameter.grad is None for parameter in session.float_model.parameters())
