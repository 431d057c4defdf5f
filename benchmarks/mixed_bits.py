"""The ablation of MPQ-DM: mixed bits (OMQ) and relation distillation (TRD), on and off.

    python benchmarks/mixed_bits.py

At W2A4 `strict`: EfficientDM's base, with OMQ, with TRD, and with both; OMQ without the smoothing
that it stands on, that with TRD, and the smoothing alone; TRD's relations of pixels against plain
L2 on the same features, and against no term at all on the same windows; the base trained in the
sampler's order; OMQ by measured error. For each seed: OMQ by kurtosis, magnitude and chance. Every
row trains with equally many samples and updates.
Writes `mixed_bits.jsonl` and `mixed_bits.md`, with what moving a group of channels does to the
layers' own error before training.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cells import Cell, read_cells, run_grid, slug, table, write_lines
from stepquant.methods.outlier_mixed_bits import kurtosis
from stepquant.methods.recipe import load_recipe, parse_recipe
from stepquant.pipelines.opening import open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.support.atomic import atomic_write

OMQ = ["smoothing", "temporal_quantizer", "outlier_mixed_bits", "low_rank_adapters"]
APART = 10_000  # image i is drawn from `seed + i`: nearer seeds would share most images
TASK, RELATION = "trajectory_distillation", "relation_distillation"


def rows(everything: bool) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Label -> (steps, settings by dotted name); without `everything` those that need seeds."""
    base = [name for name in OMQ if name not in ("smoothing", "outlier_mixed_bits")]
    smoothed = [name for name in OMQ if name != "outlier_mixed_bits"]
    mixed = [name for name in OMQ if name != "smoothing"]
    chosen: dict[str, tuple[list[str], dict[str, Any]]] = {
        "base": ([*base, TASK], {}),
        "base + smoothing": ([*smoothed, TASK], {}),
        "base + OMQ": ([*OMQ, TASK], {}),
        "base + OMQ without smoothing": ([*mixed, TASK], {}),
        "base + TRD": ([*base, RELATION], {}),
        "base + OMQ without smoothing + TRD": ([*mixed, RELATION], {}),
        "base in the sampler's order": ([*base, TASK], {f"{TASK}.step_order": "sampler"}),
    }
    if not everything:
        chosen = {}
    chosen["base + OMQ + TRD"] = ([*OMQ, RELATION], {})
    for selection in ("magnitude", "random"):
        settings = {"outlier_mixed_bits.selection": selection}
        chosen[f"OMQ by {selection} + TRD"] = ([*OMQ, RELATION], settings)
    if everything:
        settings = {"outlier_mixed_bits.selection": "error"}
        chosen["OMQ by error + TRD"] = ([*OMQ, RELATION], settings)
        chosen["OMQ by error without smoothing + TRD"] = ([*mixed, RELATION], settings)
        without = {f"{RELATION}.relation_weight": 0.0}
        chosen["base + TRD's windows alone"] = ([*base, RELATION], without)
        chosen["base + OMQ + L2 of features"] = ([*OMQ, RELATION], {f"{RELATION}.relation": "l2"})
        chosen["base + OMQ + TRD's windows alone"] = ([*OMQ, RELATION], without)
    return chosen


def recipe_of(
    label: str, steps: list[str], settings: dict[str, Any], rounds: int
) -> dict[str, Any]:
    """The plain recipe of a row."""
    plain = {
        "name": label,
        "description": "a row of the ablation",
        "scheme": {"weight_bits": 2, "activation_bits": 4},
        "ranges": load_recipe("mpq-dm").ranges.model_dump(),
        "steps": steps,
    }
    if steps[-1] == RELATION:
        rounds *= 2  # of half as many images
    recipe = parse_recipe(plain, label)
    return recipe.override({f"{steps[-1]}.rounds": rounds, **settings}).to_dict()


def means(records: list[dict[str, Any]]) -> str:
    """A markdown table of each label's mean over the seeds, with its spread."""
    fd = f"fd_{records[0]['quality']['features']}"
    lines = [
        f"| steps | seeds | {fd}, mean (lowest to highest) | {fd} to float's images | PSNR dB |"
        " held-out loss | mean layer error of OMQ |",
        "|---|---|---|---|---|---|---|",
    ]
    labels = dict.fromkeys(record["extra"].get("label") for record in records)
    for label in labels:
        of_label = [record for record in records if record["extra"].get("label") == label]
        quality = [record["quality"] for record in of_label]
        found = [row[fd] for row in quality]
        cells = [
            label or "float32",
            str(len(found)),
            f"{statistics.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})",
        ]
        if label is None:
            cells += [""] * 4
        else:
            summaries = [record["quantize"]["summary"] for record in of_label]
            trained = [summary.get(TASK) or summary[RELATION] for summary in summaries]
            mixed = [s["outlier_mixed_bits"] for s in summaries if "outlier_mixed_bits" in s]
            layers = [min(row["errors"]) for summary in mixed for row in summary["layers"]]
            cells += [
                f"{statistics.mean(row[f'{fd}_to_float'] for row in quality):.2f}",
                f"{statistics.mean(row['paired_psnr_db'] for row in quality):.2f}",
                f"{statistics.mean(row['loss_after'] for row in trained):.4f}",
                f"{statistics.mean(layers):.4f}" if layers else "",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def selections(records: list[dict[str, Any]]) -> str:
    """A markdown table of what mixing does to the layers' own errors, before any training."""
    lines = [
        "| steps | seed | layers with mixed bits | error with one group moved, over that of uniform"
        " bits | error kept, over that of uniform bits |",
        "|---|---|---|---|---|",
    ]
    for record in records:
        made = record.get("quantize", {}).get("summary", {}).get("outlier_mixed_bits")
        if made is None:
            continue
        errors = [row["errors"] for row in made["layers"]]
        mixed = sum(min(row) < row[0] for row in errors)
        cells = [
            record["extra"]["label"],
            str(record["seed"]),
            f"{mixed} of {len(errors)}",
            f"{statistics.mean(row[1] / row[0] for row in errors):.3f}",
            f"{statistics.mean(min(row) / row[0] for row in errors):.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def outliers(model: str) -> str:
    """A sentence on how heavy the tails of the float weights are, out-channel by out-channel."""
    denoiser = denoiser_of(open_pipeline(model))
    rows = [m.weight for m in denoiser.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    found = torch.cat([kurtosis(weight) for weight in rows]).double()
    low, middle, high = found.quantile(torch.tensor([0.1, 0.5, 0.99]).double()).tolist()
    return (
        f"Kurtosis of the float weights over out-channels: median {middle:.2f}, a tenth below "
        f"{low:.2f}, 99 % below {high:.2f} (normal 3, uniform 1.8).\n"
    )


def main() -> None:
    """Parse the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/mixed_bits"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mixed_bits"))
    args = parser.parse_args()

    cells = []
    for seed in range(0, args.seeds * APART, APART):
        budget = {"num": args.num, "steps": 50, "seed": seed}
        cells.append(Cell(f"float32-seed{seed}", args.model, None, **budget))
        for label, (steps, settings) in rows(everything=seed == 0).items():
            recipe = recipe_of(label, steps, settings, args.rounds)
            name, extra = f"{slug(label)}-seed{seed}", {"label": label}
            cells.append(Cell(name, args.model, recipe, **budget, extra=extra))
    run_grid(cells, args.cells, args.cells / "cache", args.jobs)
    records = read_cells(args.cells, cells)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(records, args.out.with_suffix(".jsonl"))
    text = means(records) + "\n## What mixing does to the layers' own errors\n\n"
    text += f"{outliers(args.model)}\n{selections(records)}\n"
    text += "## Every cell\n\n" + table(records)
    atomic_write(args.out.with_suffix(".md"), lambda partial: partial.write_text(text))
    print(text)


if __name__ == "__main__":
    main()
