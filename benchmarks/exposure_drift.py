"""How far what a block meets at inference lies from what it was calibrated on, round by round.

    python benchmarks/exposure_drift.py

TCAQ-DM's Progressively Aligned Reconstruction draws its calibration inputs anew with the quantized
model, because errors of earlier sampling steps change the inputs of later ones. For each round and
block this compares the block's inputs on the round's calibration set with those along the sampler's
own trajectories afterwards, from the same noise: the relative squared difference. Writes
`exposure_drift.json` and a picture of it, `exposure_drift.png`.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

from cells import machine
from records import write_record
from stepquant.calibration.block_inputs import capture_inputs, execution_order
from stepquant.calibration.trajectories import Trajectories, drawer
from stepquant.methods.progressive_alignment import FIRST_SEED
from stepquant.methods.recipe import parse_recipe
from stepquant.models.adapter import adapter_for
from stepquant.pipelines.opening import open_pipeline
from stepquant.support.atomic import atomic_write
from stepquant.support.progress import Reporter
from stepquant.verbs.quantize import quantize

CALIBRATION_SEED = 1_000_000  # where `quantize` draws its calibration images from
Rounds = list[dict[str, float]]


@torch.no_grad()
def drift(model: nn.Module, calibrated: Trajectories, met: Trajectories) -> dict[str, float]:
    """Block -> relative squared difference of its inputs, on two sets of the same images."""
    result = {}
    for name in execution_order(model, adapter_for(model).blocks(model), calibrated):
        ours, theirs = (capture_inputs(model, name, data, 64)[0][0] for data in (met, calibrated))
        result[name] = float((ours - theirs).square().sum() / theirs.square().sum())
    return result


def picture(rounds: Rounds) -> bytes:
    """A line for each round, over the blocks in execution order."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for number, found in enumerate(rounds):
        axes.plot(list(found.values()), marker=".", label=f"round {number}")
    axes.set_xticks(range(len(rounds[0])), list(rounds[0]), rotation=90, fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("inputs: inference to calibration,\nrelative squared difference")
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    return file.getvalue()


def main() -> None:
    """Quantize with each number of rounds, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:fashion-ddpm")
    parser.add_argument("--bits", type=int, default=4, help="of weights and activations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--later-iterations", type=int, default=50, help="in each later round")
    parser.add_argument("--inputs", type=int, default=256, help="compared, over all steps")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exposure_drift"))
    args = parser.parse_args()
    pipeline = open_pipeline(args.model)
    found: Rounds = []
    before: nn.Module | None = None  # the float model draws what the first round is calibrated on
    for number in range(args.rounds + 1):
        settings = {
            "progressive_alignment.rounds": number,
            "progressive_alignment.iterations": args.iterations,
            "progressive_alignment.later_iterations": args.later_iterations,
        }
        # The same seeds: a run of more rounds begins with what one of fewer rounds ended with.
        result = quantize(
            pipeline,
            "tcaq-dm",
            args.bits,
            args.bits,
            steps=args.steps,
            settings=settings,
            reporter=Reporter(),
        )
        calibration = parse_recipe(result.record["recipe"], "recipe").calibration
        draw = drawer(pipeline, calibration.steps, calibration.scheduler)
        images = calibration.trajectories
        seed = FIRST_SEED + (number - 1) * images if number else CALIBRATION_SEED
        calibrated = draw(images, seed, before).subset(args.inputs, 0)
        met = draw(images, seed, result.simulation).subset(args.inputs, 0)
        found.append(drift(result.simulation, calibrated, met))
        before = result.simulation
    record = {
        "model": args.model,
        "bits": result.record["bits"],
        "recipe": result.record["recipe"],
        "rounds": found,
        "mean": [sum(blocks.values()) / len(blocks) for blocks in found],
        "machine": machine(),
    }
    image = picture(found)
    write_record(record, args.out.with_suffix(".json"))
    atomic_write(args.out.with_suffix(".png"), lambda partial: partial.write_bytes(image))
    print(json.dumps(record["mean"]))


if __name__ == "__main__":
    main()
