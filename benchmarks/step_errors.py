"""Which sampling steps' errors the images show: the quantized model at some steps, float at others.

    python benchmarks/step_errors.py

Quantizes with ranges and step tables alone (`--bits`, W4A4), then samples with the packed model at
the steps of one part of the trajectory and with the float model at all others. Beside it, for each
step, the relative error of the prediction, and the influence that `trajectory_distillation` weighs
errors with, by spatial frequency. Writes `step_errors.json` and a picture, `step_errors.png`.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from torch import Tensor, nn

from cells import machine
from records import write_record
from stepquant.calibration.influence import image_gradients, influence_spectrum
from stepquant.calibration.trajectories import capture_trajectories
from stepquant.evaluation import paired_psnr
from stepquant.evaluation.metrics.frechet import distances
from stepquant.evaluation.metrics.noise_error import noise_error
from stepquant.methods.recipe import parse_recipe
from stepquant.pipelines.opening import default_features, open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.pipelines.sampling import sample_images, set_scheduler
from stepquant.quantizers import StepContext, StepGrid
from stepquant.support.atomic import atomic_write
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

SCHEDULER = "ddim"


def sample_mixed(
    pipeline: DiffusionPipeline,
    quantized: nn.Module,
    grid: StepGrid,
    rows: range,
    num: int,
    seed: int,
) -> Tensor:
    """Images of `pipeline` with the predictions of `quantized` at the steps `rows`."""
    model, context = denoiser_of(pipeline), StepContext(grid)

    def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if int(context.rows[0]) in rows:
            output[0].copy_(quantized(*args, **kwargs)[0])

    handles = [
        context.attach(model),
        model.register_forward_hook(replace, with_kwargs=True),
    ]
    try:
        return sample_images(pipeline, num, len(grid), seed, SCHEDULER, reporter=Reporter())
    finally:
        for handle in handles:
            handle.remove()


def picture(errors: list[float], influence: dict[str, list[float]]) -> bytes:
    """Relative error of the prediction, and influence by frequency, over the steps."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(errors, "k", label="relative error of the prediction")
    for cycles, values in influence.items():
        axes.plot(values, label=f"influence, {cycles} cycles per image")
    axes.set_yscale("log")
    axes.set_xlabel("sampling step, from noise to image")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    return file.getvalue()


def main() -> None:
    """Quantize, sample each part, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations")
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--parts", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_errors"))
    args = parser.parse_args()
    pipeline = open_pipeline(args.model)
    features = default_features(args.model)
    recipe = {
        "name": "ranges and step tables",
        "description": "no training",
        "scheme": {"weight_bits": args.bits, "activation_bits": args.bits},
        "calibration": {"steps": args.steps, "scheduler": SCHEDULER},
        "steps": ["temporal_quantizer"],
    }
    with TemporaryDirectory() as folder:
        result = quantize(
            pipeline,
            parse_recipe(recipe, "recipe"),
            out=Path(folder) / "packed",
            seed=args.seed,
            reporter=Reporter(),
        )
    quantized = denoiser_of(result.pipeline)
    grid = StepGrid(capture_trajectories(pipeline, 1, args.steps, 0, SCHEDULER).timesteps)
    reference = sample_mixed(pipeline, quantized, grid, range(0), args.num, args.seed)
    parts = []
    for rows in torch.arange(args.steps).tensor_split(args.parts):
        chosen = range(int(rows[0]), int(rows[-1]) + 1)
        images = sample_mixed(pipeline, quantized, grid, chosen, args.num, args.seed)
        found = {
            "steps": [chosen.start, chosen.stop - 1],
            "paired_psnr_db": paired_psnr(images, reference),
            **distances(images, reference, features),
        }
        parts.append(found)
        print(json.dumps(found), flush=True)
    errors = noise_error(result.pipeline, pipeline, args.steps, SCHEDULER, args.seed)
    data = capture_trajectories(pipeline, 16, args.steps, args.seed, SCHEDULER)
    sampler = copy.copy(pipeline)
    set_scheduler(sampler, SCHEDULER)
    sampler.scheduler.set_timesteps(args.steps)
    spectrum = influence_spectrum(
        image_gradients(denoiser_of(pipeline), sampler.scheduler, data, 16, args.seed, Reporter())
    )
    highest = spectrum.shape[2] // 2
    cycles = [0, *(2**k for k in range(highest.bit_length()) if 2**k <= highest)]
    influence = {str(count): spectrum[:, 0, count].tolist() for count in cycles}
    record = {
        "model": args.model,
        "recipe": recipe,
        "num": args.num,
        "seed": args.seed,
        "parts": parts,
        "relative_error": [row["relative_mse"] for row in errors],
        "influence": influence,  # by cycles per image
        "machine": machine(),
    }
    image = picture([row["relative_mse"] for row in errors], influence)
    write_record(record, args.out.with_suffix(".json"))
    atomic_write(args.out.with_suffix(".png"), lambda partial: partial.write_bytes(image))


if __name__ == "__main__":
    main()
