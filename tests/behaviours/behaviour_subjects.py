"""The models whose behaviours are tried: seven tiny denoisers, float and quantized in each way."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from torch import Tensor, nn

from architectures import ARCHITECTURES, SMALL, build
from stepquant.api import DynamicConfig, WeightOnlyConfig, quantize
from stepquant.models.adapter import adapter_for

FLOAT = "float"
MODELS = {
    "ddpm": "UNet2DModel",
    "sd": "UNet2DConditionModel (Stable Diffusion)",
    "sdxl": "UNet2DConditionModel (SDXL)",
    "dit": "DiTTransformer2DModel",
    "pixart": "PixArtTransformer2DModel",
    "sd3": "SD3Transformer2DModel",
    "flux": "FluxTransformer2DModel",
}
CALIBRATED = {"W8A8": 8, "W4A4": 4}
OWN = ("w8", "w4", "dynamic", *CALIBRATED)
PEERS = ("torchao", "quanto")
FEW = {"calibration.trajectories": 1, "ranges.weights": "minmax", "ranges.activations": "minmax"}
STEPS = 3
TOKENS = 4  # a side of Flux's image, in tokens

_folders = tempfile.TemporaryDirectory(prefix="behaviours")


def ddpm() -> DiffusionPipeline:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet.eval(), DDIMScheduler(clip_sample=False, steps_offset=1))


@cache
def float_pipeline(name: str) -> DiffusionPipeline:
    """The float pipeline `name`. Nobody changes it."""
    if name != "ddpm":
        return build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ddpm()


def component_of(name: str) -> str:
    return "unet" if name in ("ddpm", "sd", "sdxl") else "transformer"


@cache
def saved(kind: str, name: str) -> Path:
    """A folder with the denoiser `name`: float, or calibrated and packed."""
    folder = Path(_folders.name) / f"{name}-{kind}"
    pipeline, component = float_pipeline(name), component_of(name)
    if kind in CALIBRATED:
        bits = CALIBRATED[kind]
        arguments = {} if name == "ddpm" else ARCHITECTURES[name].arguments
        result = quantize(
            copy.deepcopy(pipeline), "minmax", bits, bits, None, STEPS, FEW, **arguments
        )
        pipeline = result.pipeline
    getattr(pipeline, component).save_pretrained(folder)
    return folder


def config_of(kind: str) -> Any:
    """The `quantization_config` of a kind that is quantized while it is loaded, or None."""
    if kind == "torchao":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "quanto":
        from diffusers import QuantoConfig

        return QuantoConfig(weights_dtype="int8")
    configs = {"w8": WeightOnlyConfig, "w4": WeightOnlyConfig, "dynamic": DynamicConfig}
    if kind not in configs:
        return None
    return configs[kind](bits=4) if kind == "w4" else configs[kind]()


def load(kind: str, name: str, **more: Any) -> Any:
    """A fresh denoiser of the kind."""
    config = config_of(kind)
    folder = saved(kind if config is None else FLOAT, name)
    if config is not None:
        # Named, because diffusers loads in bfloat16 for torchao without.
        more = {"torch_dtype": torch.float32, **more, "quantization_config": config}
    model = type(getattr(float_pipeline(name), component_of(name)))
    return model.from_pretrained(folder, **more).eval()


@cache
def inputs_of(name: str) -> dict[str, Any]:
    """Arguments of the denoiser's call, for two samples."""
    model = getattr(float_pipeline(name), component_of(name))
    sample, timestep, conditions = adapter_for(model).random_inputs(model, 2)
    if name == "flux":
        generator = torch.Generator().manual_seed(0)
        rows, columns = torch.meshgrid(torch.arange(TOKENS), torch.arange(TOKENS), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).float()
        sample = torch.randn(2, TOKENS**2, sample.shape[-1], generator=generator)
        conditions = {**conditions, "img_ids": places.flatten(0, 1)}
    first = "hidden_states" if name in ("dit", "pixart", "sd3", "flux") else "sample"
    return {first: sample, "timestep": timestep, **conditions}


@cache
def float_prediction(name: str) -> Tensor:
    return predict(getattr(float_pipeline(name), component_of(name)), inputs_of(name))


@cache
def own_error(kind: str, name: str) -> float:
    """The relative error of a quantized denoiser's prediction."""
    return distance(predict(load(kind, name), inputs_of(name)), float_prediction(name))


def predict(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@dataclass
class Subject:
    """A denoiser of one kind, freshly loaded, with its inputs and the float model beside it."""

    kind: str
    name: str
    folder: Path
    """An empty folder for the behaviour's files."""

    @cached_property
    def model(self) -> Any:
        return load(self.kind, self.name)

    @cached_property
    def float_model(self) -> Any:
        """A float model that the behaviour may change."""
        return load(FLOAT, self.name)

    @property
    def inputs(self) -> dict[str, Any]:
        return inputs_of(self.name)

    @property
    def sample_name(self) -> str:
        return next(iter(self.inputs))

    @property
    def named_dtype(self) -> dict[str, Any]:
        """Arguments of a load in float32: diffusers loads in bfloat16 for torchao without."""
        return {"torch_dtype": torch.float32} if self.kind in PEERS else {}

    @property
    def component(self) -> str:
        return component_of(self.name)

    def predict(self, model: Any = None, **changes: Any) -> Tensor:
        """The prediction of `model`, by default the subject's, `[2, ...]`."""
        return predict(self.model if model is None else model, {**self.inputs, **changes})

    def again(self, **more: Any) -> Any:
        """A second load of the model."""
        return load(self.kind, self.name, **more)

    def pipeline(self, model: Any = None) -> Any:
        """A pipeline of its own with `model`, by default the subject's."""
        pipeline = copy.copy(float_pipeline(self.name))
        others = {k: v for k, v in pipeline.components.items() if k != self.component}
        chosen = self.model if model is None else model
        pipeline.register_modules(**copy.deepcopy(others), **{self.component: chosen})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, pipeline: Any, steps: int = STEPS, **more: Any) -> Tensor:
        """Images `[1, ...]` of the pipeline, from the same noise at each call."""
        call: dict[str, Any] = {}
        if self.name == "dit":
            call = {"class_labels": [1]}
        elif self.name != "ddpm":
            call = {"prompt": "a cat", **ARCHITECTURES[self.name].call}
        if self.name in ("sd", "sdxl", "sd3"):
            call |= SMALL
        call |= {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(pipeline(**call, output_type="np", **more).images)

    def same(self, found: Tensor, wanted: Tensor) -> None:
        """Bits are equal."""
        assert found.dtype == wanted.dtype, f"{found.dtype} is not {wanted.dtype}"
        assert torch.equal(found, wanted), f"other bits, distance {distance(found, wanted):.2g}"

    def close(self, found: Tensor, wanted: Tensor, limit: float = 1e-4) -> None:
        """Equal but for the order of float operations."""
        error = distance(found, wanted)
        assert error <= limit, f"distance {error:.2g}: at most {limit:.2g}"

    def as_float(self, found: Tensor, wanted: Tensor, beside: float = 0.03) -> None:
        """As near to the float model's result as the plain prediction is to the float one.

        That is no narrow bound for random UNets at four bits, whose own error is up to 0.9.
        """
        assert bool(torch.isfinite(found).all()), "NaN or infinity"
        own = 0.0 if self.kind == FLOAT else own_error(self.kind, self.name)
        self.close(found, wanted, 2 * own + beside)
