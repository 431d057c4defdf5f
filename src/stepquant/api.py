"""The public functions, one for each verb of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from stepquant.checkpoint.module import load_module
from stepquant.engines import slow_paths
from stepquant.engines.captured_calls import RecordedDenoiser
from stepquant.engines.openvino_denoiser import OpenVinoDenoiser
from stepquant.lora.pipeline import load_lora, lora_scales, set_lora_scales, unload_lora
from stepquant.methods.recipe import load_recipe, recipe_names
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.denoiser_pipeline import DenoiserPipeline, general_adapter
from stepquant.pipelines.opening import open_pipeline as load
from stepquant.pipelines.sampling import AUTO, denoiser_of, sample_images
from stepquant.runtime.layers.resident import WeightBytes, set_memory_mode, weight_bytes_resident
from stepquant.support.progress import Reporter
from stepquant.verbs.bench import bench, settings_kept, with_backend
from stepquant.verbs.demo import demo
from stepquant.verbs.evaluate import evaluate
from stepquant.verbs.inspect import inspect
from stepquant.verbs.quantize import Quantized, quantize
from stepquant.weight_only.config import DynamicConfig, WeightOnlyConfig
from stepquant.weight_only.conversion import pack

__all__ = [
    "DenoiserPipeline",
    "DynamicConfig",
    "OpenVinoDenoiser",
    "Quantized",
    "RecordedDenoiser",
    "WeightBytes",
    "WeightOnlyConfig",
    "bench",
    "demo",
    "evaluate",
    "general_adapter",
    "inspect",
    "load",
    "load_lora",
    "load_module",
    "load_recipe",
    "lora_scales",
    "pack",
    "quantize",
    "recipe_names",
    "sample",
    "set_lora_scales",
    "set_memory_mode",
    "slow_paths",
    "unload_lora",
    "weight_bytes_resident",
]


def sample(
    model: str | Path | DiffusionPipeline,
    num: int = 16,
    steps: int = 50,
    seed: int = 0,
    scheduler: str | None = AUTO,
    batch: int = 64,
    reporter: Reporter | None = None,
    *,
    prompts: str | Sequence[str] | None = None,
    labels: int | Sequence[int] | None = None,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    backend: str = "auto",
    **more: Any,
) -> Tensor:
    """Images of `model` (name, folder, hub id or pipeline), float32 `[num, C, H, W]` in [0, 1].

    Image `i` starts from the noise of seed `seed + i` and is of prompt, or class label, number `i`,
    over and over again; see `stepquant.pipelines.sampling.sample_images`. `guidance`: scale of
    classifier-free guidance, else the pipeline's. `call`, and any other argument by name, goes to
    the pipeline. `backend`: what a packed model runs on, see `stepquant.verbs.bench.with_backend`.
    """
    conditioning = Conditioning.of(prompts, labels, guidance, {**(call or {}), **more})
    pipeline = load(model)
    with settings_kept(denoiser_of(pipeline)):
        return sample_images(
            with_backend(pipeline, backend),
            num,
            steps,
            seed,
            scheduler,
            batch,
            reporter,
            conditioning=conditioning,
        )


def slow_paths(pipeline: DiffusionPipeline) -> list[str]:
    """What of a packed `pipeline` is slower on this machine than it could be, a sentence each.

    None for a float pipeline; see `stepquant.engines.slow_paths`.
    """
    return slow_paths.slow_paths(denoiser_of(pipeline))
