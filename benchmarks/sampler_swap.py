"""What it costs to sample with another sampler than a model was calibrated for.

    python benchmarks/sampler_swap.py

A model is calibrated at 100 DDIM steps and sampled with DPM-Solver++ at 20 and with DDIM at 50;
beside it, for each of these, one that was calibrated for just that. A step table serves any sampler
by its nearest row; the loss is what the recalibrated model does better. Writes `sampler_swap.jsonl`
and `sampler_swap.md`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cells import Cell, report, slug
from quality import parse_bits, recipe_settings
from stepquant.methods.recipe import load_recipe
from stepquant.pipelines.sampling import SCHEDULERS
from stepquant.support.errors import StepQuantError

CALIBRATED = "ddim:100"
SAMPLED = ["dpm-solver++:20", "ddim:50"]


def parse_sampler(text: str) -> tuple[str, int]:
    """Scheduler and steps in a text such as ddim:50."""
    name, _, steps = text.partition(":")
    if name not in SCHEDULERS or not steps.isdecimal() or int(steps) < 1:
        raise StepQuantError(
            f"sampler '{text}' is not understood: expected one of {', '.join(SCHEDULERS)} and a "
            "number of steps, as in ddim:50"
        )
    return name, int(steps)


def swap_cells(
    model: str,
    recipes: list[str],
    bits: list[str],
    calibrated: str,
    sampled: list[str],
    settings: dict[str, dict[str, Any]],
    **budget: Any,
) -> list[Cell]:
    """For each sampler the float model, and each recipe calibrated for another and for itself.

    `settings` are values of each recipe by key. A model that was calibrated for another
    sampler is quantized again for each that it is sampled with, which gives the same one.
    """
    cells = []
    for sampler in sampled:
        scheduler, steps = parse_sampler(sampler)
        common = {**budget, "steps": steps, "scheduler": scheduler}
        suffix = f"{budget['num']}-seed{budget['seed']}"
        extra = {"sampled": sampler}
        name = slug(f"float32-sampled-{sampler}-{suffix}")
        cells.append(Cell(name, model, None, extra=extra, **common))
        for recipe, label in ((recipe, label) for recipe in recipes for label in bits):
            for source in dict.fromkeys((calibrated, sampler)):
                made_with, made_in = parse_sampler(source)
                weights, activations = parse_bits(label)
                plain = load_recipe(recipe).override(
                    {
                        "scheme.weight_bits": weights,
                        "scheme.activation_bits": activations,
                        "calibration.scheduler": made_with,
                        "calibration.steps": made_in,
                        **settings[recipe],
                    }
                )
                name = slug(f"{recipe}-{label}-for-{source}-sampled-{sampler}-{suffix}")
                extra = {"sampled": sampler, "calibrated": source}
                cells.append(Cell(name, model, plain.to_dict(), extra=extra, **common))
    return cells


def swap_table(records: list[dict[str, Any]]) -> str:
    """A markdown table; loss is beside the same recipe and bits calibrated for that sampler."""
    fd = f"fd_{records[0]['quality']['features']}"
    lines = [
        f"| sampled with | model | bits | calibrated for | {fd} (95 %) | PSNR dB "
        f"| loss of {fd} | loss of PSNR dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    recalibrated = {
        _key(record): record["quality"]
        for record in records
        if record["recipe"] and record["extra"]["calibrated"] == record["extra"]["sampled"]
    }
    for record in records:
        quality, sampled = record["quality"], record["extra"]["sampled"]
        low, high = quality[f"{fd}_interval"]
        distance = f"{quality[fd]:.3f} ({low:.3f} to {high:.3f})"
        if record["recipe"] is None:
            lines.append(f"| {sampled} | float32 | | | {distance} | | | |")
            continue
        calibrated, beside = record["extra"]["calibrated"], recalibrated.get(_key(record))
        loss = "| |"
        if calibrated != sampled and beside is not None:
            psnr = beside["paired_psnr_db"] - quality["paired_psnr_db"]
            loss = f"{quality[fd] - beside[fd]:+.3f} | {psnr:+.2f} |"
        lines.append(
            f"| {sampled} | {record['recipe']['name']} | {record['quantize']['bits']} "
            f"| {calibrated} | {distance} | {quality['paired_psnr_db']:.1f} | {loss}"
        )
    return "\n".join(lines) + "\n"


def _key(record: dict[str, Any]) -> tuple[str, str, str]:
    name = record["recipe"]["name"]
    return record["extra"]["sampled"], name, record["quantize"]["bits"]


def main() -> None:
    """Parse the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--recipe", action="append", default=None)
    parser.add_argument("--bits", action="append", default=None)
    parser.add_argument("--calibrated", default=CALIBRATED, metavar="scheduler:steps")
    parser.add_argument("--sampled", action="append", default=None, metavar="scheduler:steps")
    parser.add_argument("--num", type=int, default=1024, help="images of each cell")
    parser.add_argument("--set", action="append", default=[], metavar="recipe:key=value")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads for each cell")
    parser.add_argument("--cells", type=Path, default=Path("runs/sampler_swap"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampler_swap"))
    args = parser.parse_args()
    recipes = args.recipe or ["q-diffusion", "dilatequant"]
    settings = recipe_settings(parser, args.set, recipes)
    cells = swap_cells(
        args.model,
        recipes,
        args.bits or ["w4a4"],
        args.calibrated,
        args.sampled or SAMPLED,
        settings,
        num=args.num,
        seed=args.seed,
        threads=args.threads,
    )
    report(cells, args.cells, args.jobs, args.out, swap_table)


if __name__ == "__main__":
    main()
