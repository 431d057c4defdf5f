"""`stepquant quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.cli.opening import Config, opened
from stepquant.cli.options import (
    Call,
    Guidance,
    Json,
    Label,
    Model,
    Prompt,
    Prompts,
    Quiet,
    conditions,
    parse_settings,
)
from stepquant.cli.session import Talk, talk

KEPT = "; finished work is kept, continue with --resume"


def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder for the quantized pipeline.")
    ],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Name of a recipe (see stepquant recipes list) or a .yaml file."
        ),
    ] = "stepquant",
    weights: Annotated[
        int | None, typer.Option(metavar="BITS", help="Bits of weights. Default: the recipe's.")
    ] = None,
    activations: Annotated[
        int | None, typer.Option(metavar="BITS", help="Bits of activations. Default: the recipe's.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps to calibrate for. Default: the recipe's.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="STEP.KEY=VALUE", help="Override a setting of the recipe. Repeatable."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of calibration and training.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run of the same command.")
    ] = False,
    prompt: Prompt = None,
    prompts: Prompts = None,
    label: Label = None,
    guidance: Guidance = None,
    call: Call = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            "--component",
            metavar="NAME=w8",
            help="Quantize the weights of another component, such as vae, to w8 or w4. Repeatable.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory limit in GiB. Default: all free memory."),
    ] = None,
    config: Config = None,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a float model and save the result as a new pipeline folder."""
    with talk(context, quiet, json_file, KEPT) as output:
        settings = parse_settings(set_ or [])
        from stepquant import api  # not at the top: see demo.py

        (pipeline,) = opened(config, model)
        record = api.quantize(
            pipeline,
            recipe,
            weights,
            activations,
            out,
            steps,
            settings,
            seed,
            resume,
            output.reporter,
            components=parse_settings(component or [], "--component", "text_encoder=w8"),
            memory=memory,
            **conditions(prompt, prompts, label, guidance, call),
        ).record
        output.results = {"out": out, **record}
        if "denoiser" in record:
            show_weight_only(output, record)
        else:
            show_calibrated(output, record)
        output.line(f"written to {out}")


def show_calibrated(output: Talk, record: dict[str, Any]) -> None:
    """Print the results of a recipe with calibration."""
    shown = (
        "bits",
        "mean_weight_bits",
        "float32_bytes",
        "checkpoint_bytes",
        "times_smaller",
        "seconds",
        "predicted_peak_memory_mb",
        "peak_memory_mb",
    )
    output.table([{key: record[key] for key in shown}])
    for key, text in (
        ("left_float", "layers stay float"),
        ("attention_float", "attention products stay float"),
        ("reference_layers", "layers run on the reference kernel here"),
    ):
        if record[key]:
            output.line(f"{len(record[key])} {text}: {', '.join(record[key])}")
    for name, part in record["components"].items():
        smaller = part["float32_bytes"] / part["checkpoint_bytes"]
        output.line(f"{name}: weights of {part['bits']}, {smaller:.2f} times smaller")


def show_weight_only(output: Talk, record: dict[str, Any]) -> None:
    """Print the results of a weight-only recipe."""
    output.table([{"component": name, **part} for name, part in record["components"].items()])
    output.line(
        f"{record['times_smaller']:.2f} times smaller than float32, in {record['seconds']:.0f} s, "
        f"peak memory {record['peak_memory_mb']:.0f} MB"
    )
