"""`stepquant evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from stepquant.cli.opening import Config, Loras, lora_line, opened, with_loras
from stepquant.cli.options import (
    Against,
    Batch,
    Call,
    Guidance,
    Json,
    Label,
    Model,
    Prompt,
    Prompts,
    Quiet,
    Scheduler,
    Steps,
    conditions,
    scheduler_name,
)
from stepquant.cli.session import talk

NOT_MEASURED = ("num", "steps", "scheduler", "seed", "features", "slow_paths")


def evaluate(
    context: typer.Context,
    model: Model,
    against: Against,
    num: Annotated[int, typer.Option(help="Images sampled with each model.")] = 1024,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Feature network for the Fréchet distance: a built-in name or a folder. Default: "
            "that of a builtin: model; none for other models.",
        ),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Additional metric, such as class_shares or one from a plug-in. Repeatable.",
        ),
    ] = None,
    steps: Steps = 50,
    scheduler: Scheduler = "auto",
    seed: Annotated[
        int, typer.Option(help="Both models draw image i from the noise of seed + i.")
    ] = 0,
    batch: Batch = 64,
    prompt: Prompt = None,
    prompts: Prompts = None,
    label: Label = None,
    guidance: Guidance = None,
    call: Call = None,
    lora: Loras = None,
    config: Config = None,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Compare a model's images with those of its float model from the same seeds."""
    with talk(context, quiet, json_file) as output:
        from stepquant import api  # not at the top: see demo.py
        from stepquant.evaluation.metric import DEFAULT, METRICS, table_rows
        from stepquant.pipelines.opening import default_features

        ours, theirs = opened(config, model, against)
        ours, loras = with_loras(ours, lora)
        theirs, _ = with_loras(theirs, lora)  # the float model gets the same LoRAs
        record = api.evaluate(
            ours,
            theirs,
            num,
            steps,
            scheduler_name(scheduler),
            features or default_features(against),
            seed,
            batch,
            reporter=output.reporter,
            metrics=metric or (),
            **conditions(prompt, prompts, label, guidance, call),
        )
        output.results = {**record, "loras": loras}
        metrics = [METRICS[name] for name in dict.fromkeys((*DEFAULT, *(metric or ())))]
        output.table(table_rows(record, metrics, NOT_MEASURED))
        used = record["scheduler"] or "own scheduler"
        for entry in loras:
            output.line(lora_line(entry))
        output.line(f"{num} images of each model, {used} {steps} steps, seeds from {seed}")
        output.slow_paths(record["slow_paths"])
