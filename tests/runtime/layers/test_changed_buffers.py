"""What was changed in a layer's buffers is what it computes with, as after a save and a load."""

from __future__ import annotations

import copy

import pytest
import torch

from packed_models import MIXED, SCALED, outputs, packed_unet
from stepquant.engines.captured_calls import RecordedDenoiser

CHANGES = {
    "weight_zero_point": ("mid_block.resnets.0.conv1", lambda t: t[0, 0].add_(1)),
    "weight_scale": ("mid_block.resnets.0.conv1", lambda t: t.mul_(2)),
    "bias": ("mid_block.resnets.0.conv1", lambda t: t[0].add_(1)),
    "act_scale": ("mid_block.resnets.0.conv1", lambda t: t.mul_(1.5)),
    "act_zero_point": ("mid_block.resnets.0.conv1", lambda t: t.zero_()),
    "act_channel_scale": (SCALED, lambda t: t.mul_(1.1)),
    "zero point of mixed bits": (MIXED, lambda t: t[0, :3].sub_(1)),
}


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("key", CHANGES)
def test_a_change_in_place_counts_at_once(key, recorded):
    model = packed_unet()
    name, change = CHANGES[key]
    run = RecordedDenoiser(model) if recorded else model
    before = [outputs(run) for _ in range(3)][-1]
    change(getattr(model.get_submodule(name), key if "mixed" not in key else "weight_zero_point"))
    fresh = packed_unet()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    found, wanted = outputs(run), outputs(fresh)
    assert all(map(torch.equal, found, wanted))
    assert not all(map(torch.equal, found, before))
    assert all(map(torch.equal, outputs(run), wanted))


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("key", ["weight_scale", "act_scale", "bias"])
def test_another_tensor_in_the_place_of_a_buffer_counts_at_once(key, recorded):
    model = packed_unet()
    run = RecordedDenoiser(model) if recorded else model
    before = [outputs(run) for _ in range(3)][-1]
    layer = model.get_submodule(CHANGES[key][0])
    setattr(layer, key, getattr(layer, key) * 2 + 0.1)
    fresh = packed_unet()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    found, wanted = outputs(run), outputs(fresh)
    assert all(map(torch.equal, found, wanted))
    assert not all(map(torch.equal, found, before))
    assert all(map(torch.equal, outputs(run), wanted))
