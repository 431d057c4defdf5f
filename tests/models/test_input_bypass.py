from __future__ import annotations

import copy
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from stepquant.models.input_bypass import InputBypass, added, bypass_of, detach_bypass

SLOPES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


Named = namedtuple("Named", ["sample", "other"])


class Denoiser(nn.Module):
    """Repeats the first channel of its layer's result, in the form that it is asked for."""

    def __init__(self, layer, channels=1, form="tensor"):
        super().__init__()
        self.layer, self.channels, self.form = layer, channels, form

    def forward(self, noisy, timestep):
        y = self.layer(noisy)[:, :1].repeat(1, self.channels, 1, 1)
        return {
            "tensor": y,
            "tuple": (y, "more"),
            "named": Named(y, "more"),
            "output": UNet2DOutput(sample=y),
            "object": SimpleNamespace(sample=y),
        }[self.form]


def tensor_in(output):
    return getattr(output, "sample", output[0] if isinstance(output, tuple) else output)


@pytest.fixture
def denoiser(simulate, context):
    """A denoiser with a bypass, and the same without."""

    def build(channels=1, inputs=1, form="tensor"):
        plain = Denoiser(simulate(nn.Conv2d(inputs, 1, 1)), channels, form)
        context.attach(plain)
        passed = copy.deepcopy(plain)
        InputBypass("layer").attach(passed, SLOPES)
        return passed, plain

    return build


@torch.no_grad()
@pytest.mark.parametrize("form", ["tensor", "tuple", "named", "output", "object"])
@pytest.mark.parametrize("named", [False, True])
def test_each_sample_gets_the_slope_of_its_step(denoiser, form, named):
    passed, plain = denoiser(form=form)
    x, timestep = 3 * torch.randn(2, 1, 4, 4), torch.tensor([30, 0])
    arguments = {"noisy": x, "timestep": timestep}
    with_it, without = (
        m(**arguments) if named else m(x, timestep=timestep) for m in (passed, plain)
    )
    assert type(with_it) is type(without)
    slope = torch.tensor([4.0, 1.0]).view(2, 1, 1, 1)
    more = tensor_in(with_it) - tensor_in(without)
    torch.testing.assert_close(more, slope * plain.layer.input_error(x), atol=1e-5, rtol=1e-5)
    assert more.abs().max() > 0.1
    if form in ("tuple", "named"):
        assert with_it[1] == "more"


@torch.no_grad()
@pytest.mark.parametrize(("channels", "inputs"), [(3, 1), (3, 2), (1, 3)])
def test_only_channels_that_both_have_get_it(denoiser, channels, inputs):
    passed, plain = denoiser(channels, inputs)
    x, timestep = 3 * torch.randn(2, inputs, 4, 4), torch.tensor(20)
    more, common = passed(x, timestep) - plain(x, timestep), min(channels, inputs)
    error = plain.layer.input_error(x)[:, :common]
    torch.testing.assert_close(more[:, :common], 3 * error, atol=1e-5, rtol=1e-5)
    assert not more[:, common:].any()


@torch.no_grad()
def test_a_cast_model_keeps_its_slopes_and_the_dtype_of_its_prediction(denoiser):
    passed, _ = denoiser()
    passed.input_error_slope = passed.input_error_slope.to(torch.bfloat16)
    assert torch.equal(bypass_of(passed).slopes, SLOPES)
    prediction = added(torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.ones(1, 1, 2, 2))
    assert prediction.dtype == torch.bfloat16
    assert bool((prediction == 2).all())


def test_tokens_have_their_channels_last():
    prediction = added(torch.zeros(2, 5, 4), torch.ones(2, 5, 12))
    assert torch.equal(prediction, torch.ones(2, 5, 4))
    prediction = added(torch.zeros(2, 5, 8), torch.ones(2, 5, 3))
    assert torch.equal(prediction[..., :3], torch.ones(2, 5, 3))
    assert not prediction[..., 3:].any()


@torch.no_grad()
def test_a_copy_has_its_own_and_one_without_adds_nothing(denoiser):
    passed, plain = denoiser()
    x, timestep = 3 * torch.randn(1, 1, 4, 4), torch.tensor(0)
    other = copy.deepcopy(passed)
    bypass_of(other).slopes.zero_()
    assert not torch.equal(passed(x, timestep), plain(x, timestep))
    assert torch.equal(other(x, timestep), plain(x, timestep))
    assert bypass_of(passed).layer == "layer"
    detach_bypass(passed)
    assert bypass_of(passed) is None and not hasattr(passed, "input_error_slope")
    assert torch.equal(passed(x, timestep), plain(x, timestep))


@torch.no_grad()
def test_attaching_again_replaces_the_first(denoiser):
    passed, plain = denoiser()
    x, timestep = 3 * torch.randn(1, 1, 4, 4), torch.tensor(0)
    InputBypass("layer").attach(passed, 7 * SLOPES)
    added_now = passed(x, timestep) - plain(x, timestep)
    torch.testing.assert_close(added_now, 7 * plain.layer.input_error(x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_an_error_from_another_call_is_not_added(denoiser):
    passed, plain = denoiser()
    passed.layer(5 * torch.randn(1, 1, 4, 4))  # by itself, as blocks are trained
    passed.layer.quantizing = plain.layer.quantizing = False
    x, timestep = torch.randn(1, 1, 4, 4), torch.tensor(0)
    assert torch.equal(passed(x, timestep), plain(x, timestep))
