"""The ablation of TCAQ-DM: its three parts on and off, and the choices that its paper leaves open.

    python benchmarks/tcaq_dm_ablation.py

At W6A6 and W4A4 `strict`, attention's products at 8 bits: reconstruction alone (with a scale for
every step), with Timestep-Channel Reparameterization (TCR), with the adaptive softmax grid (DAQ),
with inputs drawn anew (PAR), and with all three; reconstruction alone and all three also
"corrected": with `input_error_bypass` before and `bias_correction` after it, which are not the
paper's. At W4A4 besides: rounds of PAR, truncations of
TCR, and DAQ's grid against one grid everywhere at 8 and at 4 bits of probabilities. Writes
`tcaq_dm_ablation.jsonl` and `tcaq_dm_ablation.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, report, slug
from stepquant.methods.recipe import load_recipe, parse_recipe

TCR, DAQ, PAR = "channel_reparameterization", "adaptive_softmax", "progressive_alignment"
Rows = dict[str, tuple[int, list[str], dict[str, Any]]]  # label -> (bits, steps left out, settings)


def parts() -> Rows:
    """Each of the three parts alone, none of them and all of them."""
    chosen: Rows = {}
    alone = {"TCR": [DAQ], "DAQ": [TCR], "PAR": [TCR, DAQ]}
    for bits in (6, 4):
        prefix = f"W{bits}A{bits}"
        chosen[f"{prefix} reconstruction"] = (bits, [TCR, DAQ], {f"{PAR}.rounds": 0})
        for part, without in alone.items():
            rounds = {} if part == "PAR" else {f"{PAR}.rounds": 0}
            chosen[f"{prefix} + {part}"] = (bits, without, rounds)
        chosen[f"{prefix} + TCR + DAQ + PAR"] = (bits, [], {})
    return chosen


def corrected() -> Rows:
    """No part and all of them, for a recipe in which the sampler's errors are made up for."""
    chosen: Rows = {}
    for bits in (6, 4):
        prefix = f"W{bits}A{bits}"
        chosen[f"{prefix} reconstruction, corrected"] = (bits, [TCR, DAQ], {f"{PAR}.rounds": 0})
        chosen[f"{prefix} + TCR + DAQ + PAR, corrected"] = (bits, [], {})
    return chosen


def choices() -> Rows:
    """At W4A4: rounds, truncations and grids."""
    chosen: Rows = {}
    for rounds in (0, 1, 3):  # two are the default
        chosen[f"W4A4 all, {rounds} rounds"] = (4, [], {f"{PAR}.rounds": rounds})
    for truncation in (2.0, 4.0, 100.0):  # ten is the default
        settings = {f"{PAR}.rounds": 0, f"{TCR}.truncation": truncation}
        chosen[f"W4A4 + TCR, truncation {truncation:g}"] = (4, [DAQ], settings)
    for bits in (8, 4):
        for grid in ("uniform", "log2", "error", "adaptive"):
            if (bits, grid) == (8, "adaptive"):
                continue  # the row "+ DAQ"
            settings = {
                f"{PAR}.rounds": 0,
                f"{DAQ}.grid": grid,
                "scheme.probability_bits": bits,
            }
            chosen[f"W4A4 + DAQ, {bits} bits, {grid}"] = (4, [TCR], settings)
    return chosen


def recipe_of(
    label: str, bits: int, without: list[str], settings: dict[str, Any], training: dict[str, Any]
) -> dict[str, Any]:
    """The plain recipe of a row."""
    plain = load_recipe("tcaq-dm").to_dict()
    plain["name"], plain["description"] = label, "a row of the ablation"
    plain["scheme"] |= {"weight_bits": bits, "activation_bits": bits}
    steps = [step for step in plain["steps"] if next(iter(step)) not in without]
    if label in corrected():
        steps = [*steps[:-1], "input_error_bypass", steps[-1], "bias_correction"]
    plain["steps"] = steps
    return parse_recipe(plain, label).override({**training, **settings}).to_dict()


def main() -> None:
    """Parse the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--row", action="append", default=None, help="only these; else all")
    parser.add_argument("--num", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=200, help="per block")
    parser.add_argument("--later-iterations", type=int, default=50, help="in each round of PAR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", type=Path, default=Path("runs/tcaq_dm_ablation"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tcaq_dm_ablation"))
    args = parser.parse_args()

    chosen = parts() | corrected() | choices()
    unknown = set(args.row or []) - set(chosen)
    if unknown:
        parser.error(f"--row {min(unknown)!r}: expected one of {', '.join(chosen)}")
    chosen = {label: row for label, row in chosen.items() if label in (args.row or chosen)}
    training = {
        f"{PAR}.iterations": args.iterations,
        f"{PAR}.later_iterations": args.later_iterations,
    }
    budget = {"num": args.num, "steps": 50, "seed": args.seed}
    cells = [Cell("float32", args.model, None, **budget)]
    for label, (bits, without, settings) in chosen.items():
        recipe = recipe_of(label, bits, without, settings, training)
        cells.append(Cell(slug(label), args.model, recipe, **budget, extra={"label": label}))
    report(cells, args.cells, args.jobs, args.out)


if __name__ == "__main__":
    main()
