"""`stepquant pack`, the deprecated name of `stepquant quantize --recipe weight-only`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Json, Quiet, parse_settings
from stepquant.cli.quantize import show_weight_only
from stepquant.cli.session import talk


def pack(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Diffusers folder, hub id, or builtin:NAME."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder for the quantized pipeline.")
    ],
    weights: Annotated[
        int, typer.Option(metavar="BITS", help="Bits of the denoiser's weights: 4 or 8.")
    ] = 4,
    grids: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Search for the ranges of 4-bit weights: minmax or mse (slower)."
        ),
    ] = "minmax",
    component: Annotated[
        list[str] | None,
        typer.Option(
            "--component",
            metavar="NAME=w8",
            help="Quantize the weights of another component, such as vae, to w8 or w4. Repeatable.",
        ),
    ] = None,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Deprecated: use quantize --recipe weight-only."""
    with talk(context, quiet, json_file) as output:
        from stepquant.weight_only.conversion import convert  # not at the top: see demo.py

        search = "" if grids == "minmax" else f" --set ranges.weights={grids}"
        output.reporter.line(
            "stepquant pack is deprecated and will be removed in the next release: run stepquant "
            f"quantize {model} --recipe weight-only --weights {weights}{search} --out {out}"
        )
        components = parse_settings(component or [], "--component", "vae=w8")
        record = convert(model, out, weights, grids, components, output.reporter)
        output.results = {"out": out, **record}
        show_weight_only(output, record)
        output.line(f"written to {out}")
