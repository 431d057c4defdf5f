"""The recipe `stepquant` without each of its parts, beside the three papers' recipes.

    python benchmarks/stepquant_ablation.py

At W4A4 and W2A4 (mean bits) `strict`. The papers' recipes get settings that take about as long on
one thread (the table has the seconds). Writes `stepquant_ablation.jsonl`, `stepquant_ablation.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, read_cells, run_grid, slug, table, write_lines
from stepquant.recipe import load_recipe, parse_recipe

ALLOCATION, TRAINING = "bit_allocation", "trajectory_distillation"


def variants() -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Label -> (steps left out, settings by dotted name)."""
    return {
        "stepquant": ([], {}),
        "without bit allocation": ([ALLOCATION], {}),
        "bits of weights alone": ([], {f"{ALLOCATION}.of": "weights"}),
        "without self-sampled rounds": ([], {f"{TRAINING}.self_sampled": 0.0}),
        "all weights instead of adapters": (["low_rank_adapters"], {}),
        "without training": (["low_rank_adapters", TRAINING], {}),
    }


def recipes(rounds: int, iterations: int) -> dict[str, dict[str, Any]]:
    """Label -> plain recipe, at the bits that the recipe has."""
    found = {}
    for label, (without, settings) in variants().items():
        plain = load_recipe("stepquant").to_dict()
        plain["name"] = label
        plain["steps"] = [step for step in plain["steps"] if next(iter(step)) not in without]
        shorter = {} if TRAINING in without else {f"{TRAINING}.rounds": rounds}
        found[label] = parse_recipe(plain, label).override({**shorter, **settings}).to_dict()
    for name, settings in (
        ("dilatequant", {"block_distillation.iterations": iterations}),
        ("mpq-dm", {"relation_distillation.rounds": 2 * rounds}),  # of half as many images
        (
            "tcaq-dm",
            {
                "progressive_alignment.iterations": iterations // 2,
                "progressive_alignment.later_iterations": iterations // 8,
            },
        ),
    ):
        found[name] = load_recipe(name).override(settings).to_dict()
    return found


def main() -> None:
    """Parse the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--bits", action="append", type=int, help="of weights (activations: 4)")
    parser.add_argument("--num", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=200, help="of dilatequant, per block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/stepquant_ablation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stepquant_ablation"))
    args = parser.parse_args()

    budget = {"num": args.num, "steps": 50, "seed": args.seed}
    cells = [Cell("float32", args.model, None, **budget)]
    for weights in args.bits or (4, 2):
        for label, plain in recipes(args.rounds, args.iterations).items():
            scheme = {"scheme.weight_bits": weights, "scheme.activation_bits": 4}
            recipe = parse_recipe(plain, label).override(scheme).to_dict()
            name = f"{slug(label)}-w{weights}a4"
            cells.append(Cell(name, args.model, recipe, **budget, extra={"label": label}))
    run_grid(cells, args.cells, args.cells / "cache", args.jobs)
    records = read_cells(args.cells, cells)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(records, args.out.with_suffix(".jsonl"))
    args.out.with_suffix(".md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    main()
