"""The ablation of the recipe `stepquant`: what its loss brings, and what else was tried with it.

    python benchmarks/stepquant_ablation.py --bits w4a4 --bits w2a4

Rows: squared errors of single steps (the recipe `q-diffusion`), the shared error of 4, 8 and 16
steps of a trajectory, and with 8 the weights trained instead of their rounding (`BKD`), dilated
weights (`WD`), a scale for every step (`TPQ`), inputs drawn anew (`PAR`) and the bias of the
prediction taken off. Writes `stepquant_ablation.jsonl` and `stepquant_ablation.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, report, slug
from quality import parse_bits
from stepquant.recipe import load_recipe, parse_recipe

RECONSTRUCTION, DISTILLATION = "block_reconstruction", "block_distillation"


def rows(iterations: int) -> dict[str, list[Any]]:
    """The steps of each row, by its label."""

    def trained(name: str, together: int, **more: Any) -> dict[str, Any]:
        return {name: {"iterations": iterations, "steps_together": together, **more}}

    shared = trained(RECONSTRUCTION, 8)
    later = {"rounds": 1, "later_iterations": max(1, iterations // 4)}
    return {
        "one step": [trained(RECONSTRUCTION, 1)],
        "8 together": [shared],
        "8 together, BKD": [trained(DISTILLATION, 8)],
        "8 together + bias correction": [shared, "bias_correction"],
        "8 together + TPQ": [{"temporal_quantizer": {"start": "common"}}, shared],
        "8 together + WD": ["weight_dilation", shared],
        "8 together + PAR": [trained("progressive_alignment", 8, **later)],
        "4 together": [trained(RECONSTRUCTION, 4)],
        "16 together": [trained(RECONSTRUCTION, 16)],
    }


def main() -> None:
    """Parse the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--row", action="append", default=None, help="only these; else all")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=200, help="per block")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/stepquant_ablation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stepquant_ablation"))
    args = parser.parse_args()
    chosen = rows(args.iterations)
    unknown = set(args.row or []) - set(chosen)
    if unknown:
        parser.error(f"--row {sorted(unknown)[0]!r}: expected one of {', '.join(chosen)}")

    budget = {"num": args.num, "steps": 50, "seed": args.seed}
    cells = [Cell("float32", args.model, None, **budget)]
    for bits in args.bits or ["w4a4", "w2a4"]:
        weights, activations = parse_bits(bits)
        for label in args.row or chosen:
            plain = load_recipe("stepquant").to_dict()
            plain["name"], plain["description"] = f"{bits} {label}", "a row of the ablation"
            plain["scheme"] |= {"weight_bits": weights, "activation_bits": activations}
            plain["steps"] = chosen[label]
            recipe = parse_recipe(plain, label).to_dict()
            name = f"{bits.upper()} {label}"
            cells.append(Cell(slug(name), args.model, recipe, **budget, extra={"label": name}))
    report(cells, args.cells, args.jobs, args.out)


if __name__ == "__main__":
    main()
