"""Quality of recipes on the embedded models that have conditions: prompts, class labels, guidance.

    python benchmarks/conditional.py --set dilatequant:block_distillation.iterations=200

Beside the distances and PSNR of `quality.py`: the share of images that the feature network's
classifier assigns to the class that they were asked for. Prompts, labels and the scale of guidance
are the models' own (`conditions.json` of the asset). One cell for each model, recipe and bits, as
in `quality.py`; `--guidance` adds the float model at another scale. Writes `conditional.jsonl` and
`conditional.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, report
from quality import grid, recipe_settings

MODELS = ["builtin:fashion-t2i", "builtin:fashion-dit"]
RECIPES = ["minmax", "dilatequant", "stepquant"]
BITS = ["w4a8", "w4a4"]


def conditional_table(records: list[dict[str, Any]]) -> str:
    """A markdown table; `top1` in percent, beside float's own and the agreement with its twin."""
    lines = [
        "| model | recipe | bits | fd to data (95 %) | fd to float's images | PSNR dB | top-1 % "
        "| class of float's twin % | times smaller | quantize s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        quality, model = record["quality"], record["model"].rpartition(":")[2]
        fd = f"fd_{quality['features']}"
        low, high = quality[f"{fd}_interval"]
        distance = f"{quality[fd]:.2f} ({low:.2f} to {high:.2f})"
        top1 = f"{100 * quality['top1']:.1f}"
        if record["recipe"] is None:
            scale = record["guidance"]
            name = "float32" if scale is None else f"float32, guidance {scale:g}"
            lines.append(f"| {model} | {name} | 32 | {distance} | | | {top1} | | 1 | |")
            continue
        made = record["quantize"]
        lines.append(
            f"| {model} | {record['recipe']['name']} | {made['bits']} | {distance} | "
            f"{quality[f'{fd}_to_float']:.2f} | {quality['paired_psnr_db']:.1f} | {top1} | "
            f"{100 * quality['top1_as_float']:.1f} | {made['times_smaller']:.2f} | "
            f"{made['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line and run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=None)
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--num", type=int, default=1024, help="images of each cell")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler, DDIM")
    parser.add_argument("--guidance", action="append", type=float, default=[], help="of float rows")
    parser.add_argument("--set", action="append", default=[], metavar="recipe:key=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads for each cell")
    parser.add_argument("--cells", type=Path, default=Path("runs/conditional"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/conditional"))
    args = parser.parse_args()
    settings = recipe_settings(parser, args.set, args.recipe or RECIPES)
    models = args.model or MODELS
    budget = {"num": args.num, "steps": args.steps, "seed": args.seed, "threads": args.threads}
    cells = grid(models, settings, args.bits or BITS, ["strict"], **budget)
    for model in models:
        for scale in args.guidance:
            name = f"{model.rpartition(':')[2]}-float32-guidance{scale:g}"
            name += f"-{args.num}x{args.steps}-seed{args.seed}"
            cells.append(Cell(name, model, None, guidance=scale, **budget))
    report(cells, args.cells, args.jobs, args.out, conditional_table)


if __name__ == "__main__":
    main()
