"""`stepquant inspect`."""

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
    Scheduler,
    Steps,
    conditions,
    scheduler_name,
)
from stepquant.cli.session import talk


def inspect(
    context: typer.Context,
    model: Model,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="New folder for plots.")] = None,
    num: Annotated[
        int, typer.Option(help="Images to sample with a float model for its activation ranges.")
    ] = 8,
    steps: Steps = 50,
    scheduler: Scheduler = "auto",
    seed: Annotated[int, typer.Option(help="Image i starts from the noise of seed + i.")] = 0,
    prompt: Prompt = None,
    prompts: Prompts = None,
    label: Label = None,
    guidance: Guidance = None,
    call: Call = None,
    config: Config = None,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """List the layers: activation ranges of a float model; bits and kernels of a quantized one."""
    with talk(context, quiet, json_file) as output:
        from stepquant import api  # not at the top: see demo.py

        (pipeline,) = opened(config, model)
        record = api.inspect(
            pipeline,
            plots,
            steps,
            scheduler_name(scheduler),
            num,
            seed,
            output.reporter,
            **conditions(prompt, prompts, label, guidance, call),
        )
        output.results = record
        if record["timesteps"]:
            show = packed_row if record["packed"] else float_row
            output.table([show(row) for row in record["layers"]])
            output.line(f"{len(record['timesteps'])} steps")
        else:
            output.table(record["layers"])
            float_layers = ", ".join(record["float_layers"]) or "none"
            output.line(f"{record['kind']} layers; layers that stay float: {float_layers}")
        if record.get("input_error_bypass"):
            layer = record["input_error_bypass"]["layer"]
            output.line(f"a bypass adds the quantization error of '{layer}' back to the prediction")
        for path in record.get("plots", []):
            output.line(f"written to {path}")


def float_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the table row for the input of a float layer."""
    widths = [high - low for low, high in zip(row["low"], row["high"], strict=True)]
    return {
        "layer": row["layer"],
        "part": row["part"],
        "lowest": min(row["low"]),
        "highest": max(row["high"]),
        "widest / narrowest step": max(widths) / max(min(widths), 1e-12),
        "unsaturated_share": row["unsaturated_share"],
        "median_kurtosis": row["median_kurtosis"],
    }


def packed_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return the table row for a packed layer."""
    scales = [scale for part in row["act_scale"] for scale in part]
    return {
        "layer": row["layer"],
        "weight_bits": row["weight_bits"],
        "activation_bits": row["activation_bits"],
        "packed_bytes": row["packed_bytes"],
        "kernels": row["kernels"],
        "rows": len(row["act_scale"][0]),
        "least scale": min(scales),
        "largest scale": max(scales),
    }
