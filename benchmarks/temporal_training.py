"""Temporal Parallel Quantizer against training one sampling step after another, at equal data.

    python benchmarks/temporal_training.py

DilateQuant trains the scales of all steps in mixed batches; EfficientDM and its followers give each
batch a single step and walk through the steps in sampling order, over and over. Both arms here get
the same calibration samples, batch size and number of optimizer iterations per block; the
sequential arm then gets more iterations, to see how many it takes to come to the parallel arm's
loss. Writes `temporal_training.json`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cells import machine
from records import write_record
from stepquant.pipelines.opening import open_pipeline
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize


def main() -> None:
    """Run the arms and write what each took and where it ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--longer", type=int, action="append", default=None)
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/temporal_training.json")
    )
    args = parser.parse_args()
    pipeline = open_pipeline(args.model)
    arms = [("mixed", args.iterations), ("sequential", args.iterations)]
    arms += [("sequential", count) for count in args.longer or [2 * args.iterations]]
    rows = []
    for order, iterations in arms:
        settings = {
            "block_distillation.step_order": order,
            "block_distillation.iterations": iterations,
        }
        result = quantize(pipeline, "dilatequant", 4, 4, settings=settings, reporter=Reporter())
        blocks = result.record["summary"]["block_distillation"]
        ratio = [block["loss_after"] / block["loss_before"] for block in blocks]
        rows.append(
            {
                "order": order,
                "iterations_per_block": iterations,
                "samples_drawn_per_block": iterations * 32,
                "seconds": result.record["seconds"],
                "mean_final_loss": sum(b["loss_after"] for b in blocks) / len(blocks),
                "mean_loss_ratio": sum(ratio) / len(ratio),
                "last_block_loss": blocks[-1]["loss_after"],
                "blocks": blocks,
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "blocks"})
    record = {"model": args.model, "bits": "w4a4", "machine": machine(), "arms": rows}
    write_record(record, args.out)


if __name__ == "__main__":
    main()
