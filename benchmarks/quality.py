"""Quality of recipe x bits x model x protocol, on the packed runtime.

    python benchmarks/quality.py --recipe minmax --recipe dilatequant --bits w4a8 --bits w4a4

Writes one JSON file for each cell below `--cells` (a stopped grid goes on where it was), then
`OUT.jsonl`, one line for each cell, and `OUT.md`, the table. The budget on two cores is
DDIM with 50 steps and 2,048 images; `--budget gpu` takes 100 steps and 10,000.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

from cells import BUDGETS, Cell, report
from stepquant.methods.recipe import load_recipe
from stepquant.simulation.scheme import PROTOCOLS
from stepquant.support.errors import StepQuantError


def parse_bits(text: str) -> tuple[int, int]:
    """Bits of weights and activations in a label such as w4a8."""
    match = re.fullmatch(r"w(\d)a(\d)", text)
    if match is None:
        raise StepQuantError(f"bits '{text}' are not understood: expected the form w4a8")
    return int(match[1]), int(match[2])


def recipe_settings(
    parser: argparse.ArgumentParser, entries: list[str], recipes: list[str]
) -> dict[str, dict[str, Any]]:
    """For each of `recipes` the values that `entries` of "recipe:key=value" set, by key."""
    settings: dict[str, dict[str, Any]] = {name: {} for name in recipes}
    for entry in entries:
        name, _, assignment = entry.partition(":")
        key, equals, value = assignment.partition("=")
        if name not in settings or not equals:
            parser.error(f"--set '{entry}': expected recipe:key=value, with a recipe of this run")
        settings[name][key] = yaml.safe_load(value)
    return settings


def grid(
    models: list[str],
    settings: dict[str, dict[str, Any]],
    bits: list[str],
    protocols: list[str],
    **budget: Any,
) -> list[Cell]:
    """For each model the float one, and each recipe of `settings` at all bits and protocols."""
    cells = []
    for model in models:
        short = model.rpartition(":")[2].replace("/", "-")
        suffix = f"{budget['num']}x{budget['steps']}-seed{budget['seed']}"
        cells.append(Cell(f"{short}-float32-{suffix}", model, None, **budget))
        for name in settings:
            for label in bits:
                weights, activations = parse_bits(label)
                for protocol in protocols:
                    recipe = load_recipe(name).override(
                        {
                            "scheme.weight_bits": weights,
                            "scheme.activation_bits": activations,
                            "scheme.protocol": protocol,
                            "calibration.steps": budget["steps"],
                            **settings[name],
                        }
                    )
                    cell = f"{short}-{name}-{label}-{protocol}-{suffix}"
                    cells.append(Cell(cell, model, recipe.to_dict(), **budget))
    return cells


def main() -> None:
    """Parse the command line and run the grid."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=None)
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--protocol", action="append", choices=PROTOCOLS, default=None)
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--num", type=int, help="images, instead of the budget's")
    parser.add_argument("--set", action="append", default=[], metavar="recipe:key=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads for each cell")
    parser.add_argument("--cells", type=Path, default=Path("runs/quality"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    args = parser.parse_args()
    recipes = args.recipe or ["minmax", "dilatequant"]
    settings = recipe_settings(parser, args.set, recipes)

    budget = {**BUDGETS[args.budget], "seed": args.seed, "threads": args.threads}
    if args.num:
        budget["num"] = args.num
    cells = grid(
        args.model or ["builtin:fashion-ddpm"],
        settings,
        args.bits or ["w8a8", "w4a8", "w4a4"],
        args.protocol or ["strict"],
        **budget,
    )
    report(cells, args.cells, args.jobs, args.out)


if __name__ == "__main__":
    main()
