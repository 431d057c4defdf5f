"""How many images run away in the quantized sampler, with and without headroom for the sample.

    python benchmarks/sample_headroom.py

The layer that reads the sampler's own sample cuts off what lies outside its grid, and noise is
drawn anew for every image: an image may begin beyond all that calibration has seen. The model
predicts too little of such a pixel, so that it grows from step to step. For each recipe and each
`ranges.sample_headroom` (0 here means none), from the same noise as the float model: images whose
sample leaves 1.5 times the float model's own largest magnitude at any step, paired PSNR and Fréchet
distance. Writes `sample_headroom.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from cells import machine
from quality import parse_bits
from stepquant.evaluate.metrics import paired_psnr
from stepquant.judge import distances
from stepquant.progress import Reporter
from stepquant.quantize import quantize
from stepquant.sampling import AUTO, denoiser_of, sample_images
from stepquant.sources import default_features, open_pipeline
from stepquant.workfolder import atomic_write

FAR = 1.5  # times the float model's largest magnitude at the step


def sample_with_magnitudes(
    pipeline: DiffusionPipeline, num: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Images `[num, C, H, W]` in [0, 1] and the largest |sample| that each step saw, `[num, T]`."""
    calls: list[Tensor] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        sample = args[0] if args else kwargs["sample"]
        calls.append(sample.detach().flatten(1).abs().amax(dim=1))

    handle = denoiser_of(pipeline).register_forward_pre_hook(look, with_kwargs=True)
    try:
        images = sample_images(pipeline, num, steps, seed, AUTO, reporter=Reporter())
    finally:
        handle.remove()
    # Batches come one after another, each with a call for every step.
    batches = [torch.stack(calls[i : i + steps], dim=1) for i in range(0, len(calls), steps)]
    return images, torch.cat(batches)


def main() -> None:
    """Quantize with each headroom, sample, and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--headroom", type=float, action="append", default=None)
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=100, help="of recipes that train blocks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sample_headroom"))
    args = parser.parse_args()
    pipeline = open_pipeline(args.model)
    features = default_features(args.model)
    training = {
        "dilatequant": {"block_distillation.iterations": args.iterations},
        "q-diffusion": {"block_reconstruction.iterations": args.iterations},
        "stepquant": {
            "block_distillation.iterations": args.iterations,
            "affine_distillation.iterations": args.iterations,
        },
    }
    draw = (args.num, args.steps, args.seed)
    reference, own = sample_with_magnitudes(pipeline, *draw)
    limit = FAR * own.amax(dim=0)
    lines = []
    for recipe in args.recipe or ["minmax"]:
        for bits in args.bits or ["w8a8", "w6a6"]:
            for headroom in args.headroom if args.headroom is not None else [0.0, 1.4]:
                settings = {
                    "ranges.activations": "mse",
                    "ranges.sample_headroom": headroom or None,
                    **training.get(recipe, {}),
                }
                weights, activations = parse_bits(bits)
                result = quantize(
                    pipeline,
                    recipe,
                    weights,
                    activations,
                    steps=args.steps,
                    settings=settings,
                    seed=args.seed,
                    reporter=Reporter(),
                )
                images, magnitudes = sample_with_magnitudes(result.pipeline, *draw)
                lines.append(
                    {
                        "recipe": recipe,
                        "bits": bits,
                        "sample_headroom": headroom or None,
                        "num": args.num,
                        "runaways": int((magnitudes > limit).any(dim=1).sum()),
                        "largest": float(magnitudes.max()),
                        "largest_of_float": float(own.max()),
                        "paired_psnr_db": paired_psnr(images, reference),
                        **distances(images, reference, features),
                        "settings": settings,
                        "seed": args.seed,
                        "machine": machine(),
                    }
                )
                print(json.dumps(lines[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    atomic_write(args.out.with_suffix(".jsonl"), lambda partial: partial.write_text(text))


if __name__ == "__main__":
    main()
