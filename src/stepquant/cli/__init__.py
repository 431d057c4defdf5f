"""The command line: one file for each verb, which parses, calls `stepquant.api` and prints."""

from __future__ import annotations

import sys

import typer

from stepquant.cli.bench import bench
from stepquant.cli.demo import demo
from stepquant.cli.evaluate import evaluate
from stepquant.cli.inspect import inspect
from stepquant.cli.options import Version
from stepquant.cli.quantize import quantize
from stepquant.cli.recipes import recipes
from stepquant.cli.sample import sample
from stepquant.cli.session import NOT_DONE

__all__ = ["app", "app_main"]

TYPER_INTERRUPTED = 130

app = typer.Typer(
    name="stepquant",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, quantize, sample, evaluate, bench, inspect):
    app.command()(verb)
app.add_typer(recipes, name="recipes")


@app.callback()
def stepquant(version: Version = False) -> None:
    """Low-bit diffusion models that are smaller on disk and run in integer arithmetic.

    MODEL is a local diffusers folder, a hub id, or builtin:NAME.
    """


def app_main() -> None:
    """Entry point of the `stepquant` command."""
    try:
        app(prog_name="stepquant")
    except SystemExit as end:
        # Typer's own answer to Ctrl-C outside a verb, while it parses or says good-bye.
        sys.exit(NOT_DONE if end.code == TYPER_INTERRUPTED else end.code)
