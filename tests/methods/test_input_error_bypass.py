from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stepquant.methods import BiasCorrection, InputErrorBypass, TemporalQuantizer, WeightDilation
from stepquant.models.input_bypass import SLOPES_NAME, bypass_of, detach_bypass
from stepquant.quantizers import QuantConv2d
from stepquant.quantizers.weight import minmax_weight_range
from stepquant.simulation.packing import pack_model


class AnswersHalf(nn.Module):
    """A denoiser whose prediction is a known multiple of its sample at each step."""

    def __init__(self, inner: nn.Module, slope: float) -> None:
        super().__init__()
        self.inner, self.slope = inner, slope

    def forward(self, sample, timestep, return_dict=True):
        return (self.slope * sample * (1 + timestep.view(-1, 1, 1, 1) / 1000),)


def without_bypass(session, x, timestep):
    """The quantized prediction as it would be without anything added."""
    model = copy.deepcopy(session.model)
    detach_bypass(model)
    return model(x, timestep).sample


@pytest.fixture
def coarse(tiny_session):
    """Sessions whose input layer has an 8-bit grid, with ranges that cut off."""

    def build(*steps, bits=4, num=3, **sizes):
        session = tiny_session(3, bits, num=num, **sizes)
        for step in steps:
            step.apply(session)
        session.ensure_ranges()
        quantizer = session.model.conv_in.activation_quantizers[0]
        quantizer.scale.data *= 0.6
        return session

    return build


@torch.no_grad()
@pytest.mark.parametrize("steps", [(), (WeightDilation(), TemporalQuantizer())], ids=str)
def test_what_is_added_is_the_slope_times_what_the_grid_loses(coarse, steps):
    session = coarse(*steps)
    InputErrorBypass().apply(session)
    assert bypass_of(session.model).layer == "conv_in"
    x = 2 * torch.randn(3, *session.trajectories.sample.shape[1:])
    timestep = session.trajectories.timesteps[[2, 0, 1]]
    plain = without_bypass(session, x, timestep)
    session.context.set_timestep(timestep)
    layer = session.model.conv_in
    parts = list(zip(layer.activation_quantizers, layer.input_parts(x), strict=True))
    assert len(parts) == 1
    quantizer, part = parts[0]
    held = layer.unscaled_input(quantizer(part, session.context.rows))
    slope = getattr(session.model, SLOPES_NAME)[[2, 0, 1]].view(-1, 1, 1, 1)
    expected = plain + slope * (x - held)
    found = session.model(x, timestep).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - plain).abs().max() > 1e-2


@torch.no_grad()
def test_packed_and_simulated_add_the_same(coarse):
    session = coarse(WeightDilation(), TemporalQuantizer())
    session.model.conv_in.multiply_channel_scale(torch.tensor([1.7]))
    InputErrorBypass().apply(session)
    packed = pack_model(copy.deepcopy(session.model))
    x = 2 * torch.randn(3, *session.trajectories.sample.shape[1:])
    for timestep in (session.trajectories.timesteps[1], session.trajectories.timesteps[[2, 0, 1]]):
        session.context.set_timestep(timestep)
        simulated, ours = (m.conv_in for m in (session.model, packed))
        ours.context.set_timestep(timestep)
        assert torch.equal(ours.input_error(x), simulated.input_error(x))
        found, expected = (m(x, timestep).sample for m in (packed, session.model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_slope_of_a_known_model_is_found(coarse):
    session = coarse()
    session.float_model = AnswersHalf(session.float_model, 0.5)
    InputErrorBypass().apply(session)
    expected = 0.5 * (1 + session.trajectories.timesteps / 1000)
    torch.testing.assert_close(getattr(session.model, SLOPES_NAME), expected)
    assert session.summary["input_error_bypass"]["slopes"] == pytest.approx(expected.tolist())


class Linear(nn.Module):
    """A denoiser that is one convolution: it answers to any error linearly."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(1, 1, 1, bias=False)
        self.conv_in.weight.data.fill_(0.5)

    def forward(self, sample, timestep, return_dict=True):
        return (self.conv_in(sample),)


@torch.no_grad()
def test_of_a_linear_model_nothing_is_lost_however_far_outside_the_grid(coarse):
    session = coarse()
    layer = QuantConv2d(Linear().conv_in, 8, 8, session.context)
    layer.weight_quantizers[0].fit(layer.weight, minmax_weight_range)
    layer.activation_quantizers[0].scale.data.fill_(0.02)
    layer.activation_quantizers[0].zero_point.data.fill_(128)
    layer.quantizing = True
    session.float_model, session.model = Linear(), Linear()
    session.model.conv_in = layer
    session.context.attach(session.model)
    InputErrorBypass().apply(session)
    far = 100 * torch.randn(2, 1, 8, 8)
    timestep = session.trajectories.timesteps[0]
    expected = session.float_model(far, timestep)[0]
    found = session.model(far, timestep)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    detach_bypass(session.model)
    assert (session.model(far, timestep)[0] - expected).abs().max() > 10


def test_no_more_samples_at_once_than_calibration_takes(coarse):
    session = coarse()
    session.samples_per_step, seen = 2, []
    session.float_model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    InputErrorBypass().apply(session)
    assert max(seen) == 2
    BiasCorrection().apply(session)
    assert max(seen) == 2


def test_a_prediction_of_another_size_is_left_alone(coarse):
    session = coarse()
    session.model.conv_out = nn.Sequential(session.model.conv_out, nn.AvgPool2d(2))
    InputErrorBypass().apply(session)
    said = session.summary["input_error_bypass"]["nothing_because"]
    assert said == "sample and prediction differ in more than their channels"


def test_a_grid_that_loses_nothing_has_slope_zero(coarse):
    session = coarse()
    session.trajectories.sample.zero_()
    InputErrorBypass().apply(session)
    assert torch.equal(getattr(session.model, SLOPES_NAME), torch.zeros(3))


@pytest.mark.parametrize("readers", [0, 2])
def test_without_one_layer_that_reads_the_sample_it_says_so(coarse, readers):
    session = coarse()
    if readers == 0:
        session.model.conv_in = session.float_model.conv_in
    else:
        session.model.conv_in = nn.Sequential(Both(session.model.conv_in))
    InputErrorBypass().apply(session)
    said = session.summary["input_error_bypass"]["nothing_because"]
    assert said.startswith(f"{readers} quantized layers read the sample")
    assert bypass_of(session.model) is None


class Both(nn.Module):
    """Two layers that read one input."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer, copy.deepcopy(layer)

    def forward(self, x):
        return (self.first(x) + self.second(x)) / 2


def test_gradients_pass_and_none_is_the_bypass_s(coarse):
    session = coarse()
    InputErrorBypass().apply(session)
    x, timestep = torch.randn(2, 1, 8, 8), session.trajectories.timesteps[0]
    session.model(x, timestep).sample.sum().backward()
    with_it = session.model.conv_in.activation_quantizers[0].scale.grad.clone()
    session.model.zero_grad()
    detach_bypass(session.model)
    session.model(x, timestep).sample.sum().backward()
    assert torch.equal(session.model.conv_in.activation_quantizers[0].scale.grad, with_it)
    assert with_it.abs().max() > 0
