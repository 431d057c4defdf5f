"""Quality of one packed model on each backend of the CPU, against the float model's images.

    python benchmarks/backend_quality.py

Quantizes `--model` by `--recipe` at each of `--bits` and samples it from the same noise layer by
layer (`onednn`), with blocks that hand over codes (`auto`), on OpenVINO and, few images, on the
reference kernels. Between integer sums they compute in another order, and 2 orders of float32 make
images differ; no backend may lose quality by that. Writes `backend_quality.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import machine
from quality import parse_bits
from records import write_record
from stepquant.api import sample
from stepquant.engines.backend import set_backend
from stepquant.evaluation import paired_psnr
from stepquant.methods.recipe import load_recipe
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

BACKENDS = ("onednn", "auto", "openvino", "reference")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--recipe", default="training-free")
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--backend", action="append", default=None, choices=BACKENDS)
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--reference-num", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/backend_quality.json"))
    args = parser.parse_args()
    reporter, pipeline = Reporter(), open_pipeline(args.model)
    images = sample(pipeline, args.num, args.steps, reporter=reporter)
    rows: list[dict[str, Any]] = []
    for bits in args.bits or ["w8a8", "w4a4"]:
        weights, activations = parse_bits(bits)
        recipe = load_recipe(args.recipe).override(
            {"scheme.weight_bits": weights, "scheme.activation_bits": activations}
        )
        packed = quantize(pipeline, recipe, steps=args.steps, reporter=reporter).pipeline
        for backend in args.backend or BACKENDS:
            set_backend(denoiser_of(packed), "auto")  # what the last one was asked for stays
            count = args.reference_num if backend == "reference" else args.num
            found = sample(packed, count, args.steps, backend=backend, reporter=reporter)
            psnr = paired_psnr(found, images[:count])
            row = {"bits": bits, "backend": backend, "num": count, "paired_psnr_db": psnr}
            if backend != "reference" and count > args.reference_num:
                first = found[: args.reference_num]
                row["paired_psnr_db_of_first"] = paired_psnr(first, images[: args.reference_num])
            rows.append(row)
            reporter.line(f"{bits} {backend}: {psnr:.2f} dB over {count} images")
    record = {
        "model": args.model,
        "recipe": args.recipe,
        "steps": args.steps,
        "seed": 0,
        "machine": machine(),
        "rows": rows,
    }
    write_record(record, args.out)


if __name__ == "__main__":
    main()
