"""Pipelines with a packed denoiser under diffusers' offloading."""

from __future__ import annotations

import pytest
import torch

from architectures import ARCHITECTURES, build
from stepquant.api import quantize, sample

FEW = {"calibration.trajectories": 1, "ranges.weights": "minmax", "ranges.activations": "minmax"}
WAYS = ["enable_model_cpu_offload", "enable_sequential_cpu_offload"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def packed():
    components = {"vae": "w8", "text_encoder": "w8"}
    arguments = {**ARCHITECTURES["sd"].arguments, "components": components}
    return quantize(build("sd"), "minmax", 8, 8, None, 2, FEW, **arguments).pipeline


def draw(pipeline):
    return sample(pipeline, 2, 2, **ARCHITECTURES["sd"].arguments)


def test_model_offload_draws_the_same_images(packed):
    """With the CPU as the accelerator: the hooks call `.to` on whole models."""
    before = draw(packed)
    packed.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(packed), before)
    packed.remove_all_hooks()
    assert torch.equal(draw(packed), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", WAYS)
def test_offload_on_cuda_draws_the_same_images(packed, way):
    before = draw(packed)
    getattr(packed, way)()
    assert float((draw(packed) - before).abs().max()) < 0.02
    packed.remove_all_hooks()
    assert torch.equal(draw(packed.to("cpu")), before)
