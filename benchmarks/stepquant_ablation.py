"""The ablation of the recipe `stepquant`: what its loss brings, and what else was tried with it.

    python benchmarks/stepquant_ablation.py --bits w4a4 --bits w2a4

Rows: the recipe (the input layer's errors pass by the model, weights are trained block by block
with the error that eight steps of a trajectory share, then biases and norms end to end), without
the bypass, each of its two trained stages alone and with single steps' errors, neither of them but
the bias of the prediction taken off, and the recipe with 4 and 16 steps together, with rounding
trained in the place of weights, dilated weights (`WD`), a scale for every step (`TPQ`), smoothing
and that bias taken off as well. Writes `stepquant_ablation.jsonl` and `stepquant_ablation.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, report, slug
from quality import parse_bits
from stepquant.methods.recipe import load_recipe, parse_recipe


def rows(iterations: int, affine_iterations: int) -> dict[str, list[Any]]:
    """The steps of each row, by its label."""

    def blocks(together: int, step: str = "block_distillation") -> dict[str, Any]:
        return {step: {"iterations": iterations, "steps_together": together}}

    def affine(together: int) -> dict[str, Any]:
        values = {"iterations": affine_iterations, "steps_together": together}
        return {"affine_distillation": values}

    bypass: list[Any] = ["input_error_bypass"]
    recipe = [*bypass, blocks(8), affine(8)]
    return {
        "stepquant": recipe,
        "without bypass": recipe[1:],
        "bypass and bias correction": [*bypass, "bias_correction"],
        "blocks only": [*bypass, blocks(8)],
        "blocks only, one step": [*bypass, blocks(1)],
        "biases and norms only": [*bypass, affine(8)],
        "blocks by one step": [*bypass, blocks(1), affine(8)],
        "biases and norms by one step": [*bypass, blocks(8), affine(1)],
        "rounding": [*bypass, blocks(8, "block_reconstruction"), affine(8)],
        "+ TPQ": [{"temporal_quantizer": {"start": "common"}}, *recipe],
        "+ WD": ["weight_dilation", *recipe],
        "+ smoothing": [{"smoothing": {"alpha": 0.5}}, *recipe],
        "+ bias correction": [*recipe, "bias_correction"],
        "4 together": [*bypass, blocks(4), affine(4)],
        "16 together": [*bypass, blocks(16), affine(16)],
    }


def main() -> None:
    """Parse the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--row", action="append", default=None, help="only these; else all")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=200, help="per block")
    parser.add_argument("--affine-iterations", type=int, default=150, help="end to end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/stepquant_ablation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stepquant_ablation"))
    args = parser.parse_args()
    chosen = rows(args.iterations, args.affine_iterations)
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
