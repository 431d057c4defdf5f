"""`stepquant pack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Json, Quiet, parse_settings
from stepquant.cli.session import talk


def pack(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Local diffusers folder, hub id, or builtin:NAME."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the packed pipeline.")],
    weights: Annotated[
        int, typer.Option(metavar="BITS", help="Bits of the denoiser's weights: 4 or 8.")
    ] = 4,
    grids: Annotated[
        str,
        typer.Option(metavar="NAME", help="How grids of 4 bits are found: minmax or mse (slower)."),
    ] = "minmax",
    component: Annotated[
        list[str] | None,
        typer.Option(
            "--component",
            metavar="NAME=w8",
            help="Pack another model of diffusers, such as vae, to w8 or w4; repeat.",
        ),
    ] = None,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Pack a float model's weights in little memory, without calibration."""
    with talk(context, quiet, json_file) as output:
        from stepquant import api  # not at the top: see demo.py

        components = parse_settings(component or [], "--component", "vae=w8")
        record = api.pack(model, out, weights, grids, components, output.reporter)
        output.results = {"out": out, **record}
        rows = [{"component": name, **part} for name, part in record["components"].items()]
        output.table(rows)
        output.line(
            f"{record['times_smaller']:.2f} times smaller than float32, in {record['seconds']:.0f} "
            f"s, peak memory {record['peak_memory_mb']:.0f} MB; written to {out}"
        )
