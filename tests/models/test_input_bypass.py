from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from stepquant.models.input_bypass import InputBypass, bypass_of

SLOPES = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])


class Denoiser(nn.Module):
    """Repeats the first channel of its layer's result, in the form that it is asked for."""

    def __init__(self, layer, channels=1, form="tensor"):
        super().__init__()
        self.layer, self.channels, self.form = layer, channels, form

    def forward(self, noisy, timestep):
        y = self.layer(noisy)[:, :1].repeat(1, self.channels, 1, 1)
        return {"tensor": y, "tuple": (y, "more"), "output": UNet2DOutput(sample=y)}[self.form]


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
@pytest.mark.parametrize("form", ["tensor", "tuple", "output"])
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
    added = tensor_in(with_it) - tensor_in(without)
    torch.testing.assert_close(added, slope * plain.layer.input_error(x), atol=1e-5, rtol=1e-5)
    assert added.abs().max() > 0.1
    if form == "tuple":
        assert with_it[1] == "more"


@torch.no_grad()
@pytest.mark.parametrize(("channels", "inputs"), [(3, 1), (3, 2), (1, 3)])
def test_only_channels_that_both_have_get_it(denoiser, channels, inputs):
    passed, plain = denoiser(channels, inputs)
    x, timestep = 3 * torch.randn(2, inputs, 4, 4), torch.tensor(20)
    added, common = passed(x, timestep) - plain(x, timestep), min(channels, inputs)
    error = plain.layer.input_error(x)[:, :common]
    torch.testing.assert_close(added[:, :common], 3 * error, atol=1e-5, rtol=1e-5)
    assert not added[:, common:].any()


@torch.no_grad()
def test_half_precision_stays_what_it_is(denoiser):
    passed, _ = denoiser()
    x = torch.randn(1, 1, 4, 4, dtype=torch.bfloat16)
    passed.layer.forward = lambda x: x
    assert passed(x, torch.tensor(0)).dtype == torch.bfloat16


@torch.no_grad()
def test_a_copy_has_its_own_and_one_without_slopes_adds_nothing(denoiser):
    passed, plain = denoiser()
    x, timestep = 3 * torch.randn(1, 1, 4, 4), torch.tensor(0)
    other = copy.deepcopy(passed)
    other.input_error_slope.zero_()
    assert not torch.equal(passed(x, timestep), plain(x, timestep))
    assert torch.equal(other(x, timestep), plain(x, timestep))
    assert bypass_of(passed).layer == "layer"
    del passed.input_error_slope
    assert bypass_of(passed) is None
    assert torch.equal(passed(x, timestep), plain(x, timestep))
    assert bypass_of(plain) is None
