from __future__ import annotations

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn

from stepquant.calibration.conditions import Conditions
from stepquant.calibration.trajectories import Trajectories, predict
from stepquant.models.calling import call_denoiser, on_device, tensors_in
from stepquant.verbs.bench import denoiser_call

META = torch.device("meta")


class Noting(nn.Module):
    """A denoiser on a device without values, which keeps what it was called with."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, device=META)
        self.seen = []

    def forward(self, sample, timestep, label=None, added=None):
        self.seen = [sample, timestep, label, *tensors_in(added)]
        return self.conv(sample)


CONDITIONS = {
    "label": torch.ones(2),
    "added": {"ids": torch.ones(2, 3), "rotary": (torch.ones(4), [torch.ones(4)])},
}


def test_a_denoiser_gets_all_arguments_on_the_device_of_its_sample():
    denoiser = Noting()
    call_denoiser(denoiser, torch.empty(2, 1, 4, 4, device=META), torch.zeros(2), CONDITIONS)
    assert len(denoiser.seen) == 6
    assert {value.device for value in denoiser.seen} == {META}


def test_captured_inputs_are_predicted_where_the_samples_lie():
    """Timesteps and conditions are kept on the CPU."""
    denoiser = Noting()
    label = Conditions(values={"label": torch.ones(1, 3)}, rows={"label": torch.zeros(2).long()})
    sample = torch.empty(2, 1, 4, 4, device=META)
    steps = torch.tensor([5, 5])
    predict(denoiser, Trajectories(sample, steps, torch.arange(2), steps[:1], label))
    assert {value.device for value in denoiser.seen if value is not None} == {META}
    assert len(denoiser.seen) == 3


def test_a_denoiser_is_timed_on_its_own_device():
    class Example:
        def random_inputs(self, model, batch):
            return torch.ones(2, 1, 4, 4), torch.tensor(3), CONDITIONS

    denoiser = Noting()
    denoiser_call(denoiser, 2, adapter=Example())()
    assert {value.device for value in denoiser.seen} == {META}
    denoiser_call(denoiser, 2, 500, adapter=Example())()
    assert {value.device for value in denoiser.seen} == {META}


def test_what_is_no_tensor_stays_as_it_is():
    sizes = torch.Size([2, 3])
    assert on_device({"a": sizes, "b": "text", "c": [None]}, META) == {
        "a": sizes,
        "b": "text",
        "c": [None],
    }


def test_output_classes_of_diffusers_are_opened_and_stay_what_they_are():
    output = UNet2DOutput(sample=torch.ones(2))
    moved = on_device([output], META)[0]
    assert type(moved) is UNet2DOutput and moved.sample.device == META
    assert tensors_in((output, {"more": torch.ones(1)})) == [output.sample, torch.ones(1)]
