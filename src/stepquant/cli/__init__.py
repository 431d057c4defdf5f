"""The command line: one file per verb, which parses, calls `stepquant.api` and prints."""

from __future__ import annotations

import sys

import typer
from typer.exceptions import TyperException

from stepquant.cli.bench import bench
from stepquant.cli.demo import demo
from stepquant.cli.evaluate import evaluate
from stepquant.cli.inspect import inspect
from stepquant.cli.options import Version
from stepquant.cli.pack import pack
from stepquant.cli.quantize import quantize
from stepquant.cli.recipes import recipes
from stepquant.cli.sample import sample
from stepquant.cli.session import NOT_DONE

__all__ = ["app", "app_main"]

app = typer.Typer(
    name="stepquant",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (demo, quantize, pack, sample, evaluate, bench, inspect):
    app.command()(verb)
app.add_typer(recipes, name="recipes")


@app.callback()
def stepquant(version: Version = False) -> None:
    """Quantize diffusion models, so that they are smaller and run in integer arithmetic.

    MODEL is a diffusers folder, a safetensors file, a Hugging Face hub id, or builtin:NAME for a
    model that comes with stepquant.
    """


def app_main() -> None:
    """Run the `stepquant` command; a usage error prints one sentence and exits with code 2."""
    try:
        sys.exit(app(prog_name="stepquant", standalone_mode=False))
    except TyperException as error:
        message = error.format_message().strip()
        if message:  # empty if the error was only a request for help, already printed
            typer.echo(f"{message.rstrip('.')}; see {usage_of(error)}", err=True)
        sys.exit(NOT_DONE)
    except (typer.Abort, KeyboardInterrupt):  # outside a verb, while parsing or exiting
        sys.exit(NOT_DONE)


def usage_of(error: TyperException) -> str:
    """Return the command that prints the help for the wrong usage."""
    context = getattr(error, "ctx", None)
    path = "stepquant" if context is None else context.command_path
    return f"`{path} --help`"
