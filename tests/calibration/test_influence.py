from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from stepquant.calibration.influence import image_gradients, influence_spectrum, weighted_power
from stepquant.calibration.trajectories import Trajectories
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

QUIET = Reporter(quiet=True)


class Denoiser(nn.Module):
    """Not linear, and each value of the prediction depends on many of the sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1).double()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True):
        return (self.conv(sample).tanh() + 0.3 * sample,)


def ddim(steps: int) -> DDIMScheduler:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    return scheduler


def sample(model, scheduler, x, errors=None):
    """The image, and what each step saw; `errors[row]` is added to the prediction there."""
    seen = []
    with torch.no_grad():
        for row, timestep in enumerate(scheduler.timesteps):
            seen.append(x)
            prediction = model(x, timestep)[0]
            if errors is not None and row in errors:
                prediction = prediction + errors[row]
            x = scheduler.step(prediction, timestep, x).prev_sample
    return x, seen


def trajectories(model, scheduler, images=2):
    x = torch.randn(
        images, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    _, seen = sample(model, scheduler, x)
    timesteps = scheduler.timesteps.float()
    return Trajectories(
        torch.cat(seen),
        timesteps.repeat_interleave(images),
        torch.arange(images).repeat(len(timesteps)),
        timesteps,
    )


def test_gradients_are_those_of_differences_through_the_whole_sampler():
    model, scheduler = Denoiser(), ddim(4)
    data = trajectories(model, scheduler)
    found = image_gradients(model, scheduler, data, 2, 0, QUIET)
    assert found.shape == (4, 2, 1, 6, 6)
    start = data.step(0).sample
    signs = torch.randint(0, 2, start.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    clean, _ = sample(model, scheduler, start)
    generator = torch.Generator().manual_seed(2)
    for row in range(4):
        error = 1e-6 * torch.randn(start.shape, dtype=torch.float64, generator=generator)
        moved, _ = sample(model, scheduler, start, {row: error})
        change = (signs * (moved - clean)).flatten(1).sum(dim=1)
        expected = (found[row] * error).flatten(1).sum(dim=1)
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=0)


def test_neither_the_model_nor_the_trajectories_keep_anything():
    model, scheduler = Denoiser(), ddim(3)
    data = trajectories(model, scheduler)
    image_gradients(model, scheduler, data, 1, 0, QUIET)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not data.sample.requires_grad


def test_a_predicted_variance_is_refused_where_the_scheduler_asks_for_it():
    scheduler = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(StepQuantError, match="DDPMScheduler with a variance that the model pre"):
        image_gradients(Denoiser(), scheduler, trajectories(Denoiser(), ddim(3)), 1, 0, QUIET)


def test_a_scheduler_with_a_memory_is_refused():
    model, scheduler = Denoiser(), EulerDiscreteScheduler()
    with pytest.raises(StepQuantError, match="only, not through EulerDiscreteScheduler"):
        image_gradients(model, scheduler, trajectories(model, ddim(3)), 1, 0, QUIET)


def test_a_model_that_moves_nothing_is_refused():
    model, scheduler = Denoiser(), ddim(3)
    data = trajectories(model, scheduler)
    model.conv.weight.data.fill_(float("nan"))
    with pytest.raises(StepQuantError, match="gradients by the predictions are zero, NaN"):
        image_gradients(model, scheduler, data, 1, 0, QUIET)


def test_white_gradients_have_a_flat_spectrum_of_their_mean_square():
    gradients = torch.randn(5, 64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
    spectrum = influence_spectrum(gradients)
    assert spectrum.shape == (5, 16, 16)
    torch.testing.assert_close(spectrum, torch.full_like(spectrum, 9.0), rtol=0.25, atol=0)
    assert float(spectrum.mean()) == pytest.approx(float(gradients.square().mean()), rel=1e-2)


def test_a_constant_has_all_its_power_at_frequency_zero():
    spectrum = influence_spectrum(torch.full((1, 1, 1, 8, 8), 2.0))
    assert float(spectrum[0, 0, 0]) == pytest.approx(4 * 64)
    assert float(spectrum[0].sum()) == pytest.approx(4 * 64)


def test_frequencies_of_an_octave_and_neighbouring_steps_share_their_mean():
    gradients = torch.randn(7, 2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    power = torch.fft.fft2(gradients.double(), norm="ortho").abs().square().mean(dim=(1, 2))
    ring = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    mean = torch.stack([power[:, y, x] for y, x in ring]).mean(dim=0)
    spectrum = influence_spectrum(gradients)
    for y, x in ring:
        assert float(spectrum[3, y, x]) == pytest.approx(float(mean[1:6].mean()), rel=1e-5)
        first = (3 * mean[0] + mean[1] + mean[2]) / 5  # the ends are repeated
        assert float(spectrum[0, y, x]) == pytest.approx(float(first), rel=1e-5)


def test_a_flat_spectrum_of_ones_gives_the_mean_square():
    error = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    found = weighted_power(error, torch.ones(3, 8, 8))
    torch.testing.assert_close(found, error.square().mean(dim=(1, 2, 3)))


def test_frequencies_count_by_the_spectrum_and_have_gradients():
    # A constant has one frequency, a checkerboard another.
    spectrum = torch.zeros(1, 8, 8)
    spectrum[0, 0, 0], spectrum[0, 4, 4] = 10.0, 0.5
    board = (torch.arange(8)[:, None] + torch.arange(8)[None]) % 2 * 2.0 - 1
    error = (3.0 + 2.0 * board)[None, None].requires_grad_()
    power = weighted_power(error, spectrum)
    assert float(power.detach()) == pytest.approx(10 * 9 + 0.5 * 4, rel=1e-5)
    power.sum().backward()
    expected = (2 * 10 * 3.0 + 2 * 0.5 * 2.0 * board) / 64
    torch.testing.assert_close(error.grad[0, 0], expected, rtol=1e-4, atol=1e-5)


def test_the_spectrum_tells_how_much_random_errors_of_a_frequency_move_the_image():
    model, scheduler = Denoiser(), ddim(4)
    data = trajectories(model, scheduler, images=64)
    found = image_gradients(model, scheduler, data, 64, 0, QUIET)
    power = torch.fft.fft2(found, norm="ortho").abs().square().mean(dim=(1, 2))
    start = data.step(0).sample
    clean, _ = sample(model, scheduler, start)
    for amplitude in (1e-4, -1e-4):
        moved, _ = sample(model, scheduler, start, {1: torch.full_like(start, amplitude)})
        change = float((moved - clean).square().flatten(1).sum(dim=1).mean())
        # The error has a power of 36 values times its square, all at frequency zero.
        assert change == pytest.approx(float(power[1, 0, 0]) * 36 * amplitude**2, rel=0.5)
