"""What `compare_commits.py` computes for one of its sides, in a process of its own.

The sources of that side are in PYTHONPATH. Only `stepquant.api` is used, so that this file serves
commits that have their modules in different places. All paths are relative to the current folder:
both sides name the same ones, in checkpoints and in errors.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

import stepquant
from commit_models import MODELS
from digests import VOLATILE, digest_of, file_digests, sha256, tensor_digest
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
