"""What the rounding of the sampler's own sample costs, and what is left of it with the bypass.

    python benchmarks/input_bypass.py

Without any training, each without and with the step `input_error_bypass`: nothing but the input
layer's activations quantized (the simulation; everything else is float), and at each `--bits` the
packed model with its ranges alone and with `bias_correction`. From the same noise as the float
model: images that run away (whose sample leaves 1.5 times the largest magnitude of the float model
at any step), paired PSNR, Fréchet distance. Writes `input_bypass.jsonl`.
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
from quality import parse_bits
from stepquant.calibration.observe import quant_layers
from stepquant.evaluation import paired_psnr
from stepquant.evaluation.metrics.frechet import distances
from stepquant.methods.recipe import load_recipe, parse_recipe
from stepquant.pipelines.opening import default_features, open_pipeline
from stepquant.pipelines.resolved import ResolvedPipeline, denoiser_of
from stepquant.pipelines.sampling import AUTO, sample_images
from stepquant.quantizers import QuantLayer
from stepquant.support.atomic import atomic_write
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize
from stepquant.verbs.quantized import Quantized

FAR = 1.5  # times the float model's largest magnitude at the step
BYPASS, CORRECTION = "input_error_bypass", "bias_correction"


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


def recipe_of(steps: list[str]) -> dict[str, Any]:
    """Ranges by the search for the least error, then `steps`."""
    plain = load_recipe("minmax").to_dict()
    plain["name"], plain["description"] = "mse", "a row of the benchmark"
    return {**plain, "ranges": {"weights": "mse", "activations": "mse"}, "steps": steps}


def _rounded(layer: QuantLayer, args: tuple[Tensor]) -> tuple[Tensor]:
    """What the layer's grid holds of its input; the bypass, if any, gets the rest."""
    error = layer.input_error(args[0])
    if layer.bypass is not None:
        layer.bypass.take(error)
    return (args[0] - error,)


def input_layer_alone(result: Quantized) -> DiffusionPipeline:
    """A pipeline with the simulation in which only the sample is rounded."""
    layer = next(iter(quant_layers(result.simulation)))  # the first in the order of the model
    for name, module in quant_layers(result.simulation).items():
        module.quantizing = False
        if name == layer:
            module.register_forward_pre_hook(_rounded)
    return ResolvedPipeline.of(result.pipeline).with_denoiser(result.simulation).pipeline


def main() -> None:
    """Quantize, sample, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/input_bypass"))
    args = parser.parse_args()
    pipeline, features = open_pipeline(args.model), default_features(args.model)
    draw = (args.num, args.steps, args.seed)
    reference, own = sample_with_magnitudes(pipeline, *draw)
    limit = FAR * own.amax(dim=0)
    lines: list[dict[str, Any]] = []

    def measure(what: str, bits: str, steps: list[str], alone: bool = False) -> None:
        result = quantize(
            pipeline,
            parse_recipe(recipe_of(steps), what),
            *parse_bits(bits),
            steps=args.steps,
            seed=args.seed,
            reporter=Reporter(),
        )
        sampled = input_layer_alone(result) if alone else result.pipeline
        images, magnitudes = sample_with_magnitudes(sampled, *draw)
        lines.append(
            {
                "what": what,
                "bits": bits,
                "bypass": BYPASS in steps,
                "num": args.num,
                "runaways": int((magnitudes > limit).any(dim=1).sum()),
                "largest": float(magnitudes.max()),
                "largest_of_float": float(own.max()),
                "paired_psnr_db": paired_psnr(images, reference),
                **distances(images, reference, features),
                "quantize_seconds": result.record["seconds"],
                "recipe": result.record["recipe"],
                "seed": args.seed,
                "machine": machine(),
            }
        )
        print(json.dumps(lines[-1]), flush=True)

    for first in ([], [BYPASS]):
        measure("input layer alone", "w8a8", first, alone=True)
    for bits in args.bits or ["w8a8", "w6a6", "w4a8", "w4a4"]:
        for last in ([], [CORRECTION]):
            for first in ([], [BYPASS]):
                measure(" and ".join(["ranges", *last]), bits, [*first, *last])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    atomic_write(args.out.with_suffix(".jsonl"), lambda partial: partial.write_text(text))


if __name__ == "__main__":
    main()
