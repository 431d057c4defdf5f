from __future__ import annotations

import pytest
import torch

from stepquant.models.inputs import random_sample


@pytest.mark.parametrize(("size", "shape"), [(8, (8, 8)), ((8, 16), (8, 16))], ids=str)
def test_a_sample_has_the_size_of_the_model_s_config_and_is_always_the_same(tiny_unet, size, shape):
    unet = tiny_unet(in_channels=3, out_channels=3, sample_size=size)
    sample = random_sample(unet, 2)
    assert sample.shape == (2, 3, *shape)
    assert torch.equal(random_sample(unet, 2), sample)
    assert unet(sample, torch.tensor(0)).sample.shape == sample.shape
