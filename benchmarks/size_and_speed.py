"""Size and speed of the published CIFAR-10 DDPM architecture (35.7 M parameters, random weights).

    python benchmarks/size_and_speed.py

Packs it at W4A4 and W8A8 with a step table of 100 rows, and times one denoiser call in one process,
interleaved: float32 and packed, eager and compiled. With `--model builtin:fashion-ddpm`, the same
for an embedded model. Writes `size_and_speed.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cells import machine
from paper_model import paper_pipeline
from records import write_record
from stepquant.evaluation import measure_latency
from stepquant.methods.recipe import parse_recipe
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.support.process_memory import peak_memory_mb
from stepquant.support.progress import Reporter
from stepquant.verbs.bench import denoiser_call
from stepquant.verbs.quantize import quantize

RECIPE = {
    "name": "tables",
    "description": "minimum and maximum at every step, weights dilated: everything that takes room",
    "calibration": {"trajectories": 1, "steps": 100},
    "ranges": {"weights": "minmax", "activations": "minmax"},
    "steps": ["weight_dilation", "temporal_quantizer"],
}


def main() -> None:
    """Pack, weigh and time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="paper", help="paper, or what stepquant opens")
    parser.add_argument("--batch", type=int, action="append", default=None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/size_and_speed.json"))
    args = parser.parse_args()
    reporter = Reporter()
    pipeline = paper_pipeline() if args.model == "paper" else open_pipeline(args.model)
    float_denoiser = denoiser_of(pipeline)
    record = {
        "model": args.model,
        "parameters": sum(p.numel() for p in float_denoiser.parameters()),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "sizes": {},
        "timings": [],
    }
    denoisers = {"float32": float_denoiser}
    for bits in (8, 4):
        recipe = parse_recipe(
            {**RECIPE, "scheme": {"weight_bits": bits, "activation_bits": bits}}, "recipe"
        )
        with TemporaryDirectory() as scratch:
            result = quantize(pipeline, recipe, out=Path(scratch) / "packed", reporter=reporter)
        label = result.record["bits"]
        record["sizes"][label] = {
            key: result.record[key]
            for key in ("float32_bytes", "checkpoint_bytes", "times_smaller", "mean_weight_bits")
        }
        denoisers[label] = denoiser_of(result.pipeline)
    for batch in args.batch or [1, 4, 16]:
        calls = {name: denoiser_call(model, batch, 500) for name, model in denoisers.items()}
        if not args.no_compile:
            for name, model in denoisers.items():
                reporter.line(f"compiling {name} for batch {batch}")
                calls[f"{name} compiled"] = denoiser_call(model, batch, 500, compiled=True)
                calls[f"{name} compiled"]()
        timings = measure_latency(calls, args.repeats)
        for name, timing in timings.items():
            row = {
                "batch": batch,
                "model": name,
                "median_ms": timing.median_ms,
                "p10_ms": timing.p10,
                "p90_ms": timing.p90,
                "times_faster_than_eager_float32": timings["float32"].median_ms / timing.median_ms,
            }
            record["timings"].append(row)
            reporter.line(
                f"batch {batch:>2} {name:<18} {timing.median_ms:8.1f} ms  "
                f"{row['times_faster_than_eager_float32']:.2f}x"
            )
    record["peak_memory_mb"] = peak_memory_mb()
    write_record(record, args.out)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
