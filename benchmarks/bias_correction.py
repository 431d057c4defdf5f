"""What taking off the mean error of each step's prediction does to the images.

    python benchmarks/bias_correction.py --trained

Ranges and step tables without any training, and with `--trained` DilateQuant besides, each without
and with `bias_correction`, at W4A4 `strict` (`--bits`, can be repeated). Writes
`bias_correction.jsonl` and `bias_correction.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, report, slug
from quality import parse_bits
from stepquant.methods.recipe import parse_recipe

TABLES: list[Any] = ["temporal_quantizer"]
TRAINED = ["weight_dilation", "temporal_quantizer", "block_distillation"]


def main() -> None:
    """Parse the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--trained", action="store_true", help="DilateQuant too")
    parser.add_argument("--iterations", type=int, default=200, help="of its block distillation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/bias_correction"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bias_correction"))
    args = parser.parse_args()

    rows = {"ranges and step tables": TABLES}
    if args.trained:
        rows["dilatequant"] = [*TRAINED[:-1], {TRAINED[-1]: {"iterations": args.iterations}}]
    budget = {"num": args.num, "steps": 50, "seed": args.seed}
    cells = [Cell("float32", args.model, None, **budget)]
    for bits in args.bits or ["w4a4"]:
        weights, activations = parse_bits(bits)
        for label, steps in rows.items():
            for more in ([], ["bias_correction"]):
                full = " + ".join([label, *more])
                plain = {
                    "name": full,
                    "description": "a row of the benchmark",
                    "scheme": {"weight_bits": weights, "activation_bits": activations},
                    "steps": [*steps, *more],
                }
                recipe = parse_recipe(plain, full).to_dict()
                name = f"{slug(full)}-{bits}"
                cells.append(Cell(name, args.model, recipe, **budget, extra={"label": full}))
    report(cells, args.cells, args.jobs, args.out)


if __name__ == "__main__":
    main()
