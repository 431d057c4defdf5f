"""The ablation that DilateQuant's reviewers missed: WD, TPQ and BKD on and off, and WD's rivals.

    python benchmarks/ablation.py

All eight combinations of Weight Dilation, Temporal Parallel Quantizer and Block-wise Knowledge
Distillation at W4A4 strict, and SmoothQuant(0.5) scaling in the place of Weight Dilation. With it,
layer by layer, the share of in-channels that a scaling moves and the activation range before and
after. Writes `ablation.jsonl`, `ablation.md`.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

from cells import Cell, read_cells, run_grid, table, write_lines
from stepquant.methods.recipe import parse_recipe

STEPS = {"WD": "weight_dilation", "TPQ": "temporal_quantizer", "BKD": "block_distillation"}


def combination(parts: tuple[str, ...], scaling: str | None, iterations: int) -> dict[str, Any]:
    """The plain recipe with the named parts of DilateQuant, or with another scaling for WD."""
    steps: list[dict[str, Any]] = [] if scaling is None else [{scaling: {}}]
    steps += [{STEPS[part]: {}} for part in STEPS if part in parts]
    for step in steps:
        if "block_distillation" in step:
            step["block_distillation"] = {"iterations": iterations}
    plain = {
        "name": "+".join([*([scaling] if scaling else []), *parts]) or "none",
        "description": "a combination of the ablation",
        "scheme": {"weight_bits": 4, "activation_bits": 4},
        "steps": steps,
    }
    return parse_recipe(plain, "combination").to_dict()


def scaling_table(record: dict[str, Any]) -> str:
    """Per layer: share of scaled in-channels, median factor, activation range before and after."""
    lines = [
        "| layer | part | folded | in-channels scaled | median factor | range | range after |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in ("weight_dilation", "smoothing"):
        for row in record["quantize"]["summary"].get(step, []):
            lines.append(
                f"| {row['layer']} | {row['part']} | {'yes' if row['folded'] else 'no'} | "
                f"{row['scaled_share']:.0%} | {row['median_factor']:.2f} | "
                f"{row['range_before']:.2f} | {row['range_after']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run the combinations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablation"))
    args = parser.parse_args()

    budget = {"num": args.num, "steps": 50, "seed": args.seed}
    cells = [Cell(f"float32-{args.num}", args.model, None, **budget)]
    chosen = [parts for count in range(4) for parts in itertools.combinations(STEPS, count)]
    for parts in chosen:
        recipe = combination(parts, None, args.iterations)
        extra = {"label": " + ".join(parts) or "none (MSE ranges)"}
        cells.append(
            Cell(f"{recipe['name']}-{args.num}", args.model, recipe, **budget, extra=extra)
        )
    for parts in ((), ("TPQ", "BKD")):
        recipe = combination(parts, "smoothing", args.iterations)
        extra = {"label": " + ".join(["SmoothQuant(0.5)", *parts])}
        cells.append(
            Cell(f"{recipe['name']}-{args.num}", args.model, recipe, **budget, extra=extra)
        )
    run_grid(cells, args.cells, args.cells / "cache", args.jobs)
    records = read_cells(args.cells, cells)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(records, args.out.with_suffix(".jsonl"))
    text = table(records)
    for label in ("WD", "SmoothQuant(0.5)"):
        for record in records:
            if record["extra"].get("label") == label:
                text += f"\n## {label}, layer by layer\n\n{scaling_table(record)}"
    args.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
