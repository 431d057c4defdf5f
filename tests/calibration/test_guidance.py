from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from stepquant.calibration.conditions import Conditions
from stepquant.calibration.guidance import mixed, mixing_weights
from stepquant.calibration.influence import image_gradients
from stepquant.calibration.trajectories import Trajectories
from stepquant.support.progress import Reporter

STEPS = 5


class Denoiser(nn.Module):
    """Not linear, and what it predicts depends on the label."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.shift = nn.Embedding(3, 1)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor, return_dict: bool = True):
        return (self.conv(sample + self.shift(label)[:, :, None, None]).tanh() + 0.3 * sample,)


def ddim(**options) -> DDIMScheduler:
    scheduler = DDIMScheduler(**{"clip_sample": False, **options})
    scheduler.set_timesteps(STEPS)
    return scheduler


def sampled(model, scheduler, weights, images=3, errors=None, scale=lambda row: 1.0, **options):
    """The images, and the inputs of their trajectories; the label of image `i`'s input `k` is `k`.

    `weights` are those of its predictions, times `scale(row)` at a step but for the last, whose
    weight makes up for it.
    """
    kinds, dtype = len(weights), model.conv.weight.dtype
    x = torch.randn(images, 1, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    label = torch.arange(kinds).repeat(images)
    seen = []
    with torch.no_grad():
        for row, timestep in enumerate(scheduler.timesteps):
            seen.append(x.repeat_interleave(kinds, dim=0))
            given = torch.tensor(weights, dtype=dtype) * scale(row)
            given[-1] = 1 - given[:-1].sum()
            prediction = mixed(model(seen[-1], timestep, label)[0], given)
            if errors is not None and row in errors:
                prediction = prediction + errors[row]
            x = scheduler.step(prediction, timestep, x, **options).prev_sample
    timesteps = scheduler.timesteps.float()
    data = Trajectories(
        torch.cat(seen),
        timesteps.repeat_interleave(images * kinds),
        torch.arange(images).repeat_interleave(kinds).repeat(STEPS),
        timesteps,
        Conditions({"label": torch.arange(kinds)}, {"label": label.repeat(STEPS)}),
    )
    return x, data


@pytest.mark.parametrize(
    "weights",
    [[1.0], [3.0, -2.0], [-6.5, 7.5], [4.0, -1.5, -1.5]],
    ids=lambda w: f"{len(w)} {w[0]:g}",
)
def test_the_weights_are_those_that_the_sampler_mixed_with(weights):
    model, scheduler = Denoiser(), ddim()
    _, data = sampled(model, scheduler, weights)
    found = mixing_weights(model, scheduler, data)
    torch.testing.assert_close(found, torch.tensor(weights), rtol=1e-3, atol=1e-3)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_a_mix_is_the_weighted_sum_of_neighbours():
    predictions = torch.arange(8.0).view(4, 2)
    expected = [[-4.0, -3.0], [0.0, 1.0]]
    assert mixed(predictions, torch.tensor([3.0, -2.0])).tolist() == expected
    assert mixed(predictions, torch.ones(1)) is predictions


def unknown(case):
    """A float model, a sampler and trajectories whose weights cannot be told."""
    model, scheduler, weights = Denoiser(), ddim(), [3.0, -2.0]
    if case == "clipped":
        scheduler = ddim(clip_sample=True, clip_sample_range=0.3)
    if case == "a scale that changes":
        data = sampled(model, scheduler, weights, scale=lambda row: 1 + row)[1]
    elif case == "noise":
        data = sampled(model, scheduler, weights, eta=1.0)[1]
    else:
        data = sampled(model, scheduler, weights)[1]
    if case == "another sampler":
        scheduler = DDPMScheduler.from_config(scheduler.config)
    if case == "samples of two kinds":
        data.sample[::2] += 1
    if case == "guidance that ends":
        data = data.take(
            (data.timestep > data.timesteps[-1]) | (data.conditions.rows["label"] == 0)
        )
    if case == "one step":
        data = replace(data.step(0), timesteps=data.timesteps[:1])
    return model, scheduler, data


@pytest.mark.parametrize(
    "case",
    [
        "clipped",
        "a scale that changes",
        "noise",
        "another sampler",
        "samples of two kinds",
        "guidance that ends",
        "one step",
    ],
)
def test_where_they_cannot_be_told_there_are_none(case):
    assert mixing_weights(*unknown(case)) is None


def test_gradients_by_the_mix_are_those_of_differences_through_the_whole_sampler():
    model, scheduler = Denoiser().double(), ddim()
    weights = [3.0, -2.0]
    clean, data = sampled(model, scheduler, weights)
    quiet = Reporter(quiet=True)
    found = image_gradients(model, scheduler, data, 3, 0, quiet, torch.tensor(weights).double())
    assert found.shape == (STEPS, 3, 1, 6, 6)
    signs = torch.randint(0, 2, clean.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    generator = torch.Generator().manual_seed(2)
    for row in range(STEPS):
        error = 1e-6 * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
        moved, _ = sampled(model, scheduler, weights, errors={row: error})
        change = (signs * (moved - clean)).flatten(1).sum(dim=1)
        expected = (found[row] * error).flatten(1).sum(dim=1)
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=0)
