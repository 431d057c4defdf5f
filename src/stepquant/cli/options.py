"""Options that several verbs share, and their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from stepquant import __version__
from stepquant.errors import StepQuantError

OWN_SCHEDULER = "own"

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Local diffusers folder, hub id, or builtin:NAME."),
]
Against = Annotated[
    str, typer.Option(metavar="FLOAT_MODEL", help="The float model to compare with.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Write a record of the run there (docs/cli.md); replaced."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Scheduler = Annotated[
    str,
    typer.Option(metavar="NAME", help="ddim, ddpm, dpm-solver++, euler, or own: the pipeline's."),
]
Batch = Annotated[int, typer.Option(help="Images sampled at a time; changes no image.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]


def scheduler_name(text: str) -> str | None:
    """The API's name of a scheduler: None stands for the pipeline's own."""
    return None if text == OWN_SCHEDULER else text


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """`["step.key=value", ...]` as the API takes it; values are YAML, and the last one counts."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise StepQuantError(
                f"--set '{text}' is not understood: expected step.key=value, as in "
                "block_distillation.iterations=300"
            )
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise StepQuantError(
                f"--set '{text}' has a value that is not YAML: expected a number, a word or a "
                "list such as [1, 2]"
            ) from error
    return settings
