"""The models that `cpu_runtime.py` times: sizes of published ones, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from large_models import MAX_TOKENS, SMALL_SD15, write_weights
from paper_model import paper_pipeline
from stepquant.pipelines.denoiser_pipeline import DenoiserPipeline
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.support.errors import StepQuantError

MIDDLE = 500  # of 1000 timesteps
SD15 = {"sample_size": 64, "cross_attention_dim": 768}
DIT_XL = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "sample_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_embeds_ada_norm": 1000,
}
SMALL_DIT = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8}


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call; the order of `conditions` is that of an exported model's inputs."""

    sample: Tensor
    timestep: Tensor
    conditions: dict[str, Tensor]

    def to(self, dtype: torch.dtype) -> Inputs:
        """With floating tensors in `dtype`."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        conditions = {name: cast(tensor) for name, tensor in self.conditions.items()}
        return Inputs(cast(self.sample), self.timestep, conditions)

    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [self.sample, self.timestep, *self.conditions.values()]


@dataclass(frozen=True)
class SpeedModel:
    """One model of the grid.

    `build(small, layers, seed)` gives the float denoiser. `transformer`: whether its blocks are
    mostly attention and feed-forward layers, which NNCF wants to know.
    """

    name: str
    what: str
    batches: tuple[int, ...]
    transformer: bool
    build: Callable[[bool, int | None, int], nn.Module]
    takes_layers: bool = False

    def label(self, small: bool, layers: int | None, tables: bool) -> str:
        """What rows and files call it, with everything that makes it another model."""
        parts = [self.name]
        if layers is not None and self.takes_layers:
            parts.append(f"{layers}-layers")
        if tables and self.name == "paper":
            parts.append("tables")
        return "-".join([*parts, "small"] if small else parts)


def _embedded(small: bool, layers: int | None, seed: int) -> nn.Module:
    del small, layers, seed
    return denoiser_of(open_pipeline("builtin:fashion-ddpm"))


def _paper(small: bool, layers: int | None, seed: int) -> nn.Module:
    del layers
    if not small:
        return paper_pipeline(seed).unet
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def _sd15(small: bool, layers: int | None, seed: int) -> nn.Module:
    del layers
    config = {**SD15, **SMALL_SD15, "sample_size": 16} if small else SD15
    return _random("UNet2DConditionModel", config, seed)


def _dit_xl(small: bool, layers: int | None, seed: int) -> nn.Module:
    config = {**DIT_XL, **SMALL_DIT} if small else dict(DIT_XL)
    if layers is not None:
        config["num_layers"] = layers
    return _random("DiTTransformer2DModel", config, seed)


def _random(kind: str, config: dict[str, Any], seed: int) -> nn.Module:
    """Weights that keep the scale of what they are applied to (`large_models.random_tensor`)."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_weights(folder, kind, config, seed)
        return getattr(diffusers, kind).from_pretrained(folder, torch_dtype=torch.float32)


MODELS = {
    model.name: model
    for model in (
        SpeedModel("embedded", "builtin:fashion-ddpm", (1, 4, 16), False, _embedded),
        SpeedModel("paper", "the CIFAR-10 DDPM, 35.7 M parameters", (1, 4, 16), False, _paper),
        SpeedModel("sd15", "the UNet of Stable Diffusion 1.5, 860 M", (2,), True, _sd15),
        SpeedModel("dit-xl", "DiT-XL/2, 675 M", (2,), True, _dit_xl, takes_layers=True),
    )
}


def build_model(name: str, small: bool, layers: int | None, seed: int) -> nn.Module:
    """The float denoiser, ready to be called."""
    return MODELS[name].build(small, layers, seed).eval().requires_grad_(False)


def random_inputs(config: Any, batch: int, seed: int = 0) -> Inputs:
    """Noise, a timestep in the middle, and random text tokens or class labels."""
    generator = torch.Generator().manual_seed(seed)
    size = config["sample_size"]
    sample = torch.randn(batch, config["in_channels"], size, size, generator=generator)
    at = torch.tensor(MIDDLE)
    if config["_class_name"] == "UNet2DModel":
        return Inputs(sample, at, {})
    if config["_class_name"] == "UNet2DConditionModel":
        shape = (batch, MAX_TOKENS, config["cross_attention_dim"])
        return Inputs(
            sample, at, {"encoder_hidden_states": torch.randn(shape, generator=generator)}
        )
    if config["_class_name"] == "DiTTransformer2DModel":
        labels = torch.randint(config["num_embeds_ada_norm"], (batch,), generator=generator)
        return Inputs(sample, at.expand(batch).clone(), {"class_labels": labels})
    raise StepQuantError(
        f"no random inputs are known for a {config['_class_name']}: expected UNet2DModel, "
        "UNet2DConditionModel or DiTTransformer2DModel"
    )


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The prediction, `[B, C, H, W]`."""
    return model(inputs.sample, timestep=inputs.timestep, **inputs.conditions, return_dict=False)[0]


def calibration_pipeline(model: nn.Module) -> DenoiserPipeline:
    """A sampler around `model` that calls it once for each of its steps, with random conditions.

    What it draws means nothing; ranges are taken of inputs of the right scale.
    """
    config = model.config

    def draw(denoiser: nn.Module, noise: Tensor, steps: int, generators: list[Any]) -> Tensor:
        del generators
        given = random_inputs(config, len(noise))
        x = noise
        for t in torch.linspace(999, 0, steps).long():
            at = t.expand(given.timestep.shape) if given.timestep.dim() else t
            prediction = call(denoiser, Inputs(x, at, given.conditions))
            prediction = prediction[:, : x.shape[1]]
            x = (x - prediction / steps) / (1 + 1 / steps**2) ** 0.5
        return (x[:, :3] / 2 + 0.5).clamp(0, 1)

    size = config["sample_size"]
    return DenoiserPipeline(model, (config["in_channels"], size, size), draw=draw)
