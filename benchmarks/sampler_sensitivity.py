"""How far a small error of the denoiser carries, with and without DDIM's clipping.

    python benchmarks/sampler_sensitivity.py

Adds white noise to every prediction of the float denoiser, of a given mean square over that of the
prediction (1e-4 to 1e-3 is what 8-bit activations cost), and compares the images with those of the
undisturbed model under the same sampler. `clip_sample` is the scheduler's setting that limits the
predicted image to [-1, 1] at every step. Writes `sampler_sensitivity.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cells import machine
from records import write_record
from stepquant.evaluation import paired_psnr
from stepquant.evaluation.metrics.frechet import distances
from stepquant.pipelines.opening import default_features, open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.pipelines.sampling import sample_images
from stepquant.support.progress import Reporter

NOISE = (1e-4, 1e-3)


def with_clipping(pipeline: DiffusionPipeline, clip: bool) -> DiffusionPipeline:
    """`pipeline` with `clip_sample` on or off in its scheduler."""
    scheduler = pipeline.scheduler
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, clip_sample=clip)
    return pipeline


def disturb(denoiser: nn.Module, power: float) -> torch.utils.hooks.RemovableHandle:
    """Add white noise of `power` times the mean square of each prediction."""
    generator = torch.Generator().manual_seed(0)

    def add(_: nn.Module, __: Any, output: Any) -> Any:
        sample: Tensor = output[0]
        deviation = (power * sample.square().mean()).sqrt()
        noisy = sample + deviation * torch.randn(sample.shape, generator=generator)
        if isinstance(output, tuple):
            return (noisy, *output[1:])
        output.sample = noisy
        return output

    return denoiser.register_forward_hook(add)


def main() -> None:
    """Sample under both settings, undisturbed and disturbed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/sampler_sensitivity.json")
    )
    args = parser.parse_args()
    reporter = Reporter()
    features = default_features(args.model)
    if features is None:
        parser.error(f"no feature network is known for '{args.model}'")
    rows: list[dict[str, Any]] = []
    for clip in (True, False):
        pipeline = with_clipping(open_pipeline(args.model), clip)
        reference = sample_images(pipeline, args.num, args.steps, reporter=reporter)
        for power in NOISE:
            handle = disturb(denoiser_of(pipeline), power)
            images = sample_images(pipeline, args.num, args.steps, reporter=reporter)
            handle.remove()
            row = {
                "clip_sample": clip,
                "relative_noise": power,
                "paired_psnr_db": paired_psnr(reference, images),
                "brighter_by": float((images - reference).mean()),
            }
            row.update(distances(images, reference, features))
            rows.append(row)
            reporter.line(json.dumps(row))
    record = {
        "model": args.model,
        "num": args.num,
        "sampler": f"ddim, {args.steps} steps",
        "seed": 0,
        "machine": machine(),
        "rows": rows,
    }
    write_record(record, args.out)


if __name__ == "__main__":
    main()
