"""`stepquant demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.options import Json, Quiet
from stepquant.cli.session import talk


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder for the models and the images.")
    ] = Path("stepquant-demo"),
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Quantize a built-in model in several ways, and compare quality, speed and size."""
    with talk(context, quiet, json_file, f"; delete '{out}' before the next try") as output:
        # Imported here because it loads torch and diffusers, which `--help` should not wait for.
        from stepquant import api

        record = api.demo(out, reporter=output.reporter)
        output.results = record
        output.table(record["table"])
        output.line(f"written to {out}")
