from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stepquant.calibration.trajectories import Trajectories
from stepquant.methods import BiasCorrection, TemporalQuantizer
from stepquant.methods.bias_correction import channels_of_outputs
from stepquant.simulation.packing import pack_model
from stepquant.support.errors import StepQuantError


def bias_of(model, session):
    """Mean error of each channel at each step, `[T, C]`, over all calibration inputs."""
    data = session.trajectories
    rows = []
    with torch.no_grad():
        for row, timestep in enumerate(data.timesteps):
            x = data.step(row).sample
            error = model(x, timestep).sample - session.float_model(x, timestep).sample
            rows.append(error.mean(dim=(0, 2, 3)))
    return torch.stack(rows)


@pytest.mark.parametrize("tables", [False, True], ids=["static", "temporal"])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_step_has_a_bias_afterwards_in_the_packed_model_too(tiny_session, tables, channels):
    session = tiny_session(3, 4, in_channels=channels, out_channels=channels, num=4)
    if tables:
        TemporalQuantizer().apply(session)
    session.ensure_ranges()
    before = bias_of(session.model, session)
    BiasCorrection().apply(session)
    summary = session.summary["bias_correction"]
    torch.testing.assert_close(torch.tensor(summary["bias"]), before, rtol=1e-4, atol=1e-6)
    assert summary["mean_square"] == pytest.approx(float(before.square().mean()), rel=1e-4)
    assert before.abs().max() > 1e-3
    assert bias_of(session.model, session).abs().max() < 1e-5
    packed = pack_model(copy.deepcopy(session.model))
    assert packed.conv_out.step_bias.shape == (3, channels)
    assert bias_of(packed, session).abs().max() < 0.05 * before.abs().max()


def test_only_the_output_layer_changes(tiny_session):
    session = tiny_session(4, 4)
    session.ensure_ranges()
    before = {key: value.clone() for key, value in session.model.state_dict().items()}
    BiasCorrection().apply(session)
    after = session.model.state_dict()
    changed = {
        key for key, value in after.items() if not torch.equal(value, before.get(key, value))
    }
    assert set(after) - set(before) == {"conv_out.step_bias"}
    assert not changed - {key for key in after if key.startswith("conv_out.activation_quantizers")}


def test_an_output_layer_that_stayed_float_is_refused(tiny_session):
    session = tiny_session(4, 4)
    session.ensure_ranges()
    session.model.conv_out = session.float_model.conv_out
    with pytest.raises(StepQuantError, match="the last layer 'conv_out', which is not quantized"):
        BiasCorrection().apply(session)


def test_a_layer_whose_result_is_not_the_prediction_is_refused(tiny_session, monkeypatch):
    session = tiny_session(4, 4)
    monkeypatch.setattr(type(session.adapter), "input_output_layers", lambda *_: {"conv_in"})
    with pytest.raises(StepQuantError, match="'conv_in', which does not give the prediction"):
        BiasCorrection().apply(session)


class Patches(nn.Module):
    """Its last layer gives `2 x 2` patches of three channels, patch by patch, channels last."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.last, self.scale = nn.Linear(12, 12), scale

    def forward(self, sample, timestep):
        patches = sample.unfold(2, 2, 2).unfold(3, 2, 2)  # [B, 3, h, w, 2, 2]
        tokens = self.last(patches.permute(0, 2, 3, 4, 5, 1).flatten(3))
        whole = tokens.unflatten(3, (2, 2, 3)).permute(0, 5, 1, 3, 2, 4)
        return self.scale * whole.flatten(4, 5).flatten(2, 3)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_channels_of_patches_are_found_and_nothing_else(scale):
    sample, timestep = torch.randn(2, 3, 8, 8), torch.tensor([1.0])
    data = Trajectories(sample, timestep.repeat(2), torch.arange(2), timestep)
    found = channels_of_outputs(Patches(scale), "last", -1, data)
    if scale == 1.0:
        assert found.tolist() == [0, 1, 2] * 4
    else:  # what is predicted is not what the layer gives
        assert found is None
