"""What `compare_commits.py` computes for one of its sides, in a process of its own.

The sources of that side are in PYTHONPATH. Only `stepquant.api` is used, so that this file serves
commits that have their modules in different places. All paths are relative to the current folder:
both sides name the same ones, in checkpoints and in errors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import string
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PipelineQuantizationConfig,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import stepquant
from stepquant import api

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "openvino")
BACKENDS = ("auto", "reference")
SAMPLED = {"num": 2, "steps": 3, "seed": 5}
STEPS = 4  # to calibrate for
WEIGHT_ONLY = "weight-only"  # the recipe, which older commits have as the function `pack`
CALIBRATED = {"calibration.trajectories": 4, "calibration.batch": 4}
AT_MOST = {  # instead of a step's own value, where that is larger
    "iterations": 3,
    "later_iterations": 2,
    "rounds": 2,
    "batch": 4,
    "samples": 16,
    "samples_per_step": 2,
    "steps_together": 2,
}
OWN_RECIPE = """\
name: own
description: Steps and settings that no shipped recipe has.
ranges: {weights: minmax, activations: minmax}
steps:
  - temporal_quantizer
  - bit_allocation: {fewest_weight_bits: 3, most_weight_bits: 5, most_activation_bits: 5}
  - low_rank_adapters
  - trajectory_distillation: {self_sampled: 0.5, influence_exponent: 1.0}
  - bias_correction
"""
VOLATILE = (  # fields of JSON that may differ where nothing else does
    *("versions", "_diffusers_version", "transformers_version", "_name_or_path"),
    *("seconds", "peak_memory_mb", "predicted_peak_memory_mb"),
)


@dataclass(frozen=True)
class Model:
    """A tiny pipeline, the bits of weights and activations, and what all functions are told.

    `components`: what is quantized beside the denoiser. `ranges`: instead of the recipes' own.
    """

    build: Callable[[], DiffusionPipeline]
    denoiser: str
    bits: tuple[int, int]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)
    ranges: str | None = None


def unconditional() -> DiffusionPipeline:
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    )
    return DDPMPipeline(unet=with_weights(unet), scheduler=DDPMScheduler())


def text_to_image() -> DiffusionPipeline:
    letters = string.ascii_lowercase
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {name: number for number, name in enumerate(names)}
    encoder = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=24,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(encoder).eval(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        unet=with_weights(unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def class_to_image() -> DiffusionPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # the pipeline knows no other number of classes
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return DiTPipeline(transformer=with_weights(transformer), vae=vae(), scheduler=scheduler)


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    ).eval()


def with_weights(denoiser: nn.Module) -> nn.Module:
    """Input channels of different strength, norms unlike the identity, nothing that is zero.

    Scalings then have something to do, and a wrong fold changes the result.
    """
    for module in denoiser.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            strength = (0.5 * torch.randn(module.weight.shape[1])).exp()
            module.weight.data.mul_(strength.view(1, -1, *(1,) * (module.weight.dim() - 2)))
        elif isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
    return denoiser.eval()


MODELS = {
    "unet": Model(unconditional, "unet", (4, 4)),
    "text": Model(
        text_to_image,
        "unet",
        (3, 8),
        {"prompts": ["a cat", "boat"], "guidance": 3.0},
        {"vae": "w8", "text_encoder": "w8"},
        "minmax",  # the search takes long for so many layers
    ),
    "dit": Model(class_to_image, "transformer", (4, 8), {"labels": [3, 7], "guidance": 2.0}),
}


def work(source: Path, models: list[str], recipes: list[str]) -> None:
    """Compute rows with the package in `source`; print what they share and each row as JSON."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print too, and their lines are no rows
    torch.set_num_threads(1)
    for name in models:
        torch.manual_seed(0)
        MODELS[name].build().save_pretrained(Path("models", name))
    Path("own.yaml").write_text(OWN_RECIPE)
    if source not in Path(stepquant.__file__).resolve().parents:
        raise RuntimeError(f"stepquant was imported from '{stepquant.__file__}', not '{source}'")
    rows: dict[str, Callable[[str, str], dict[str, str]]] = {
        "float": float_row,
        **dict.fromkeys([*calibrated_recipes(), "own"], recipe_row),
        "pack w8": partial(pack_row, bits=8),
        "pack w4": partial(pack_row, bits=4),
        "on load": on_load_row,
    }
    todo = [(m, r) for m in models for r in rows if not recipes or r in recipes]
    about = {
        "models": {name: digest_of(file_digests(Path("models", name))) for name in models},
        "machine": machine(),
        "settings": settings(),
        "todo": len(todo),
    }
    print(json.dumps(about), file=lines)
    for model, recipe in todo:
        started = time.process_time()
        parts = outcome(partial(rows[recipe], model, recipe))
        row = {"model": model, "recipe": recipe, "parts": parts}
        print(json.dumps({**row, "seconds": round(time.process_time() - started, 2)}), file=lines)


def outcome(row: Callable[[], dict[str, str]]) -> dict[str, str]:
    """The parts of a row; or one part, the sentence of its refusal or the error that it ends in."""
    try:
        return row()
    except Exception as error:
        if is_refusal(error):
            return {"refused": str(error)}
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def is_refusal(error: Exception) -> bool:
    """Whether it is the package's own error, whose module may move."""
    return any(kind.__name__ == "StepQuantError" for kind in type(error).__mro__)


def machine() -> dict[str, Any]:
    """What numbers depend on besides the code."""
    info = Path("/proc/cpuinfo")
    cpu: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        cpu.setdefault(key.strip(), value.strip())
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": sha256(cpu.get("flags", "").encode())[:16],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": versions,
    }


def settings() -> dict[str, Any]:
    """What digests depend on besides the code, the weights and the machine."""
    told = {name: dict(vars(model)) for name, model in MODELS.items()}
    for values in told.values():
        del values["build"]
    return {
        "models": told,
        "sampled": SAMPLED,
        "calibrated": {"calibration.steps": STEPS, **CALIBRATED},
        "at_most": AT_MOST,
        "own_recipe": OWN_RECIPE,
        "volatile": VOLATILE,
    }


def float_row(model: str, recipe: str) -> dict[str, str]:
    """Images of the float model."""
    return {"images": image_digest(model, api.load(Path("models", model)), "auto")}


def calibrated_recipes() -> list[str]:
    """The names of the recipes with calibration."""
    return [name for name in api.recipe_names() if name != WEIGHT_ONLY]


def recipe_row(model: str, recipe: str) -> dict[str, str]:
    """Quantize by a recipe with few iterations."""
    subject, target = MODELS[model], Path("out", model, recipe)
    recipe = "own.yaml" if recipe == "own" else recipe
    settings: dict[str, Any] = dict(CALIBRATED)
    if subject.ranges is not None:
        settings |= {"ranges.weights": subject.ranges, "ranges.activations": subject.ranges}
    for step in api.load_recipe(recipe).to_dict()["steps"]:
        for name, values in step.items():
            for key in values.keys() & AT_MOST.keys():
                settings[f"{name}.{key}"] = min(values[key], AT_MOST[key])
    done = api.quantize(
        Path("models", model),
        recipe,
        *subject.bits,
        out=target,
        steps=STEPS,
        settings=settings,
        seed=0,
        components=subject.components,
        **subject.conditions,
    )
    return {"record": digest_of(done.record), **checkpoint_digests(model, target)}


def pack_row(model: str, recipe: str, bits: int) -> dict[str, str]:
    """Quantize weights without calibration: by a recipe, or in older commits by `pack`."""
    subject, target = MODELS[model], Path("out", model, recipe)
    # A text encoder is no model of diffusers, and `pack` takes no others.
    components = {name: way for name, way in subject.components.items() if name == "vae"}
    grids = "mse" if bits < 8 else "minmax"
    source = Path("models", model)
    if WEIGHT_ONLY in api.recipe_names():
        found = {"ranges.weights": grids}
        done = api.quantize(
            source, WEIGHT_ONLY, bits, out=target, settings=found, components=components
        )
        record = {key: value for key, value in done.record.items() if key != "recipe"}
    else:
        record = api.pack(source, target, bits, grids, components)
    return {"record": digest_of(record), **checkpoint_digests(model, target)}


def on_load_row(model: str, recipe: str) -> dict[str, str]:
    """Quantize while diffusers loads: activations of the denoiser at each call, weights alone."""
    subject, target = MODELS[model], Path("out", model, recipe)
    configs = {name: api.WeightOnlyConfig() for name in subject.components}
    configs[subject.denoiser] = api.DynamicConfig()
    pipeline = DiffusionPipeline.from_pretrained(
        Path("models", model),
        quantization_config=PipelineQuantizationConfig(quant_mapping=configs),
    )
    pipeline.save_pretrained(target)
    return checkpoint_digests(model, target)


def checkpoint_digests(model: str, folder: Path) -> dict[str, str]:
    """Of a checkpoint's files, and of its images on each backend; and what is slow here."""
    found = file_digests(folder)
    for backend in BACKENDS:
        pipeline = api.load(folder)
        try:
            found[f"images {backend}"] = image_digest(model, pipeline, backend)
        except Exception as error:
            if not is_refusal(error):
                raise
            found[f"images {backend}"] = f"refused: {error}"
        if backend == "auto":  # a kernel that is no longer found is slow, with the same numbers
            found["slow paths"] = json.dumps(api.slow_paths(pipeline))
    return found


def image_digest(model: str, pipeline: DiffusionPipeline, backend: str) -> str:
    """Of a few images, which have to be finite and not of one color."""
    images = api.sample(pipeline, **SAMPLED, backend=backend, **MODELS[model].conditions)
    if not images.isfinite().all() or images.std() == 0:
        raise RuntimeError(f"images on {backend} range from {images.min()} to {images.max()}")
    return tensor_digest(images)


def tensor_digest(tensor: Tensor) -> str:
    return sha256(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())


def file_digests(folder: Path) -> dict[str, str]:
    """Of every file below `folder`; of JSON without the fields of `VOLATILE`."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        found[name] = digest_of(json.loads(content)) if path.suffix == ".json" else sha256(content)
    return found


def digest_of(value: Any) -> str:
    """Of plain values in their order, without the fields of `VOLATILE`."""
    return sha256(json.dumps(lasting(value)).encode())


def lasting(value: Any) -> Any:
    """`value` without the fields of `VOLATILE`, at any depth."""
    if isinstance(value, dict):
        return {key: lasting(entry) for key, entry in value.items() if key not in VOLATILE}
    return [lasting(entry) for entry in value] if isinstance(value, list | tuple) else value


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    """Compute what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the folder that stepquant has to come from")
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--recipe", action="append")
    args = parser.parse_args()
    work(args.source, args.model or list(MODELS), args.recipe or [])


if __name__ == "__main__":
    main()
