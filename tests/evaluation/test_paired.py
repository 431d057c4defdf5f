import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.evaluation import noise_prediction_error, paired_psnr, paired_ssim
from stepquant.support.errors import StepQuantError


def images(count=3, channels=1, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, size, size, generator=generator)


def ssim_oracle(a, b):
    """SSIM of two [H, W] images by its definition, one window at a time, mirrored at the edges."""
    a, b = (torch.nn.functional.pad(x[None], (5, 5, 5, 5), mode="reflect")[0] for x in (a, b))
    ticks = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(ticks**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    c1, c2 = 0.01**2, 0.03**2
    values = []
    for top in range(a.shape[0] - 10):
        for left in range(a.shape[1] - 10):
            x = a[top : top + 11, left : left + 11].double()
            y = b[top : top + 11, left : left + 11].double()
            mx, my = (window * x).sum(), (window * y).sum()
            vx, vy = (window * (x - mx) ** 2).sum(), (window * (y - my) ** 2).sum()
            cov = (window * (x - mx) * (y - my)).sum()
            values.append(
                (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
            )
    return float(torch.stack(values).mean())


@pytest.mark.parametrize(
    ("difference", "decibels"),
    [
        (1.0, 0.0),
        (0.1, 20.0),  # mean squared error 0.01
        (0.5, 10 * math.log10(4)),
        (0.01, 40.0),
    ],
)
def test_psnr_of_a_constant_difference(difference, decibels):
    dark = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    assert paired_psnr(dark, dark + difference) == pytest.approx(decibels, abs=1e-5)


def test_psnr_of_one_wrong_pixel():
    a = torch.zeros(1, 1, 2, 5)
    b = a.clone()
    b[0, 0, 0, 0] = 1.0  # mean squared error 1/10
    assert paired_psnr(a, b) == pytest.approx(10.0, abs=1e-6)


def test_psnr_is_averaged_over_pairs_and_not_over_pooled_errors():
    a = torch.zeros(2, 1, 4, 4)
    b = torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.01)])
    assert paired_psnr(a, b) == pytest.approx((20 + 40) / 2, abs=1e-5)


def test_identical_pairs_count_100_decibels():
    a = images(2)
    assert paired_psnr(a, a) == 100.0
    b = a.clone()
    b[1] = torch.where(a[1] > 0.5, a[1] - 0.1, a[1] + 0.1)
    assert paired_psnr(a, b) == pytest.approx((100 + 20) / 2, abs=1e-4)


def test_psnr_below_the_ceiling_is_not_cut():
    a = torch.full((1, 1, 4, 4), 0.5, dtype=torch.float64)
    assert paired_psnr(a, a + 10**-4.9) == pytest.approx(98.0, abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_matches_its_definition(channels):
    a, b = images(2, channels, 14), images(2, channels, 14, seed=1)
    b = 0.7 * a + 0.3 * b
    expected = [ssim_oracle(a[n, c], b[n, c]) for n in range(2) for c in range(channels)]
    assert paired_ssim(a, b) == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_ssim_of_identical_images_is_one():
    assert paired_ssim(images(), images()) == pytest.approx(1.0, abs=1e-6)


def test_ssim_does_not_depend_on_the_chunks():
    a, b = images(501, size=12), images(501, size=12, seed=1)
    halves = paired_ssim(a[:250], b[:250]) * 250 + paired_ssim(a[250:], b[250:]) * 251
    assert paired_ssim(a, b) == pytest.approx(halves / 501, abs=1e-6)


@given(seed=st.integers(0, 10_000), noise=st.floats(0.01, 0.4))
@settings(max_examples=25, deadline=None)
def test_more_noise_is_further_away_and_the_order_does_not_matter(seed, noise):
    a, other = images(2, seed=seed), images(2, seed=seed + 1)
    near, far = a.lerp(other, noise / 2), a.lerp(other, noise)
    assert paired_psnr(a, near) > paired_psnr(a, far)
    assert paired_ssim(a, near) > paired_ssim(a, far)
    assert paired_psnr(a, far) == pytest.approx(paired_psnr(far, a), abs=1e-6)
    assert paired_ssim(a, far) == pytest.approx(paired_ssim(far, a), abs=1e-5)


NAN = images()
NAN[0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        pytest.param(images(2), images(3), r"\[2, 1, 16, 16\] and images_b \[3, ", id="count"),
        pytest.param(images()[0], images(), r"images_a have shape \[1, 16, 16\]", id="no batch"),
        pytest.param(images(), images()[:0], r"images_b have shape \[0, ", id="empty"),
        pytest.param(images(), images() * 2 - 1, "images_b have values from -", id="signed"),
        pytest.param(NAN, images(), "images_a have values from nan", id="nan"),
        pytest.param(images(), images().byte(), r"images_b have dtype torch\.uint8", id="uint8"),
    ],
)
@pytest.mark.parametrize("function", [paired_psnr, paired_ssim])
def test_bad_pairs(function, a, b, message):
    with pytest.raises(StepQuantError, match=message):
        function(a, b)


def test_ssim_needs_images_of_the_window_or_more():
    with pytest.raises(StepQuantError, match=r"\[3, 1, 10, 10\]: expected .* of 11 or more"):
        paired_ssim(images(size=10), images(size=10))


def test_noise_prediction_error_by_hand():
    wanted = [torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]])]
    found = [torch.tensor([[3.0, 3.0]]), torch.tensor([[0.0, 0.0]])]
    # Squared errors 0 + 1 over 9 + 16, then 4 over 4.
    assert noise_prediction_error(wanted, found, [900, 1]) == [
        {"timestep": 900, "relative_mse": pytest.approx(0.04)},
        {"timestep": 1, "relative_mse": 1.0},
    ]


def test_noise_prediction_error_takes_one_tensor_for_all_steps():
    wanted, steps = images(4).unsqueeze(1), torch.tensor([3, 2, 1, 0])
    found = wanted + 0.1
    stacked = noise_prediction_error(wanted, found, steps)
    assert stacked == noise_prediction_error(list(wanted), list(found), steps.tolist())
    assert [type(row["timestep"]) for row in stacked] == [int] * 4


@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_noise_prediction_error_does_not_depend_on_the_unit(seed, scale):
    wanted, found = images(seed=seed).double(), images(seed=seed + 1).double()
    plain = noise_prediction_error([wanted], [found], [0])[0]["relative_mse"]
    scaled = noise_prediction_error([wanted * scale], [found * scale], [0])[0]["relative_mse"]
    assert scaled == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(
    ("wanted", "found", "steps", "message"),
    [
        pytest.param([images()], [images()], [1, 2], "1 float outputs, 1 .* 2 timesteps", id="T"),
        pytest.param([], [], [], "one step or more", id="no steps"),
        pytest.param([images()], [images(2)], [7], r"timestep 7 has shape \[2, ", id="shape"),
        pytest.param([images() * 0], [images()], [7], "timestep 7 .* mean square of 0", id="zero"),
        pytest.param([images()], [NAN], [7], "timestep 7 .* error of nan", id="nan"),
        pytest.param([images() / 0], [images()], [7], "timestep 7 .* square of inf", id="infinite"),
    ],
)
def test_bad_noise_predictions(wanted, found, steps, message):
    with pytest.raises(StepQuantError, match=message):
        noise_prediction_error(wanted, found, steps)
