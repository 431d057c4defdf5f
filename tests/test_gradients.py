"""Gradients through whole quantized denoisers, against the float model."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import Tensor, nn

from architectures import ARCHITECTURES, build
from stepquant.api import DynamicConfig, WeightOnlyConfig, load, quantize
from stepquant.calibration.trajectories import Trajectories, capture_trajectories, predict
from stepquant.pipelines.conditioning import Conditioning

STEPS = 3
FEW = {"calibration.trajectories": 2, "ranges.weights": "minmax", "ranges.activations": "minmax"}

pytestmark = pytest.mark.usefixtures("one_thread")


def gradient(model: nn.Module, inputs: Trajectories) -> tuple[Tensor, Tensor]:
    """The prediction, and the gradient of its product with random numbers by the sample."""
    x = inputs.sample.clone().requires_grad_()
    y = predict(model, replace(inputs, sample=x))
    of = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (y * of).sum().backward()
    assert x.grad is not None
    return y.detach().flatten(), x.grad.flatten()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


@cache
def last_inputs(name: str) -> tuple[DiffusionPipeline, Trajectories]:
    """A float pipeline, and its denoiser's inputs at the last step of its sampler."""
    pipeline, arguments = build(name), ARCHITECTURES[name].arguments
    conditions = Conditioning.of(
        arguments.get("prompts"), arguments.get("labels"), None, arguments["call"]
    )
    own = None if name in ("sd3", "flux") else "ddim"
    inputs = capture_trajectories(pipeline, 2, STEPS, 1_000_000, own, conditioning=conditions)
    return pipeline, inputs.step(STEPS - 1)


@pytest.mark.parametrize("recipe", ["minmax", "training-free"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_calibrated_denoiser_has_the_float_gradient(name: str, recipe: str) -> None:
    pipeline, inputs = last_inputs(name)
    component = ARCHITECTURES[name].component
    arguments = ARCHITECTURES[name].arguments
    result = quantize(build(name), recipe, 8, 8, None, STEPS, FEW, **arguments)
    packed: Any = getattr(result.pipeline, component)
    _, wanted = gradient(getattr(pipeline, component), inputs)
    prediction, found = gradient(packed, inputs)
    assert cosine(found, wanted) > 0.98
    assert float(found.norm() / wanted.norm()) == pytest.approx(1, abs=0.1)
    with torch.no_grad():  # the same model, except for the order of operations in fused passes
        again = predict(packed, inputs).flatten()
    assert float((prediction - again).norm() / again.norm()) < 0.01


def test_a_loaded_denoiser_follows_no_gradient_that_nobody_asked_for(tmp_path: Any) -> None:
    """Its float parameters are frozen: a call outside no_grad is the same, and as fast."""
    _, inputs = last_inputs("sd")
    arguments = ARCHITECTURES["sd"].arguments
    quantize(build("sd"), "minmax", 8, 8, tmp_path / "out", STEPS, FEW, **arguments)
    unet = load(tmp_path / "out").unet
    with torch.no_grad():
        wanted = predict(unet, inputs)
    found = predict(unet, inputs)
    assert not found.requires_grad and torch.equal(found, wanted)
    unet.conv_norm_out.weight.requires_grad_()  # asked for: what is before it stays as it was
    assert torch.equal(predict(unet, inputs).detach(), wanted)


def test_a_trained_norm_has_a_gradient() -> None:
    pipeline, inputs = last_inputs("sd")
    arguments = ARCHITECTURES["sd"].arguments
    packed = quantize(build("sd"), "minmax", 8, 8, None, STEPS, FEW, **arguments).pipeline.unet
    found = []
    for unet in (packed, copy.deepcopy(pipeline.unet)):
        unet.requires_grad_(False)
        weight = unet.mid_block.resnets[0].norm1.weight
        weight.requires_grad_()
        # With the sample's: torch 2.13 crashes where a norm's weight alone has a gradient and its
        # input is channels last.
        gradient(unet, inputs)
        found.append(weight.grad.clone())
    assert cosine(*found) > 0.98


class LowRank(nn.Module):
    """A forward hook that adds a LoRA to a linear layer, as peft does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, 4, bias=False)
        self.up = nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def __call__(self, layer: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y + self.up(self.down(args[0]))


def losses(unet: Any, inputs: Trajectories) -> list[float]:
    """Of a LoRA of the attention that is trained to predict noise."""
    unet.requires_grad_(False)
    trained: list[nn.Parameter] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, layer in unet.named_modules():
            if name.endswith(("to_q", "to_k", "to_v")):
                branch = LowRank(layer)
                layer.register_forward_hook(branch)
                trained += branch.parameters()
    optimizer = torch.optim.AdamW(trained, 1e-2)
    target = torch.randn(inputs.sample.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(12):
        loss = (predict(unet, inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("config", [DynamicConfig(), WeightOnlyConfig(), WeightOnlyConfig(bits=4)])
def test_a_lora_is_trained_on_a_model_without_calibration(config: Any, tmp_path: Any) -> None:
    pipeline, inputs = last_inputs("sd")
    pipeline.save_pretrained(tmp_path)
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
    unet = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=mapping).unet
    found, wanted = losses(unet, inputs), losses(copy.deepcopy(pipeline.unet), inputs)
    gained, possible = found[0] - found[-1], wanted[0] - wanted[-1]
    assert possible > 0.01 and gained > 0.8 * possible
