"""Options that several verbs share, and the parsing of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from stepquant.support.errors import StepQuantError
from stepquant.support.version import __version__

OWN_SCHEDULER = "own"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Diffusers folder, safetensors file, hub id, or builtin:NAME."
    ),
]
Against = Annotated[str, typer.Option(metavar="FLOAT_MODEL", help="Float model to compare with.")]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write a JSON record of the run to FILE, replacing an existing file.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Scheduler = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="ddim, ddpm, dpm-solver++, euler, lcm, flow-euler, own (the pipeline's own) or auto "
        "(own for flow-matching models, ddim for others).",
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Prompt. Repeatable; images take the prompts in turn."),
]
Prompts = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Text file with one prompt per line.")
]
Label = Annotated[
    list[int] | None,
    typer.Option(
        metavar="NUMBER",
        help="Class to draw. Repeatable; images take the classes in turn. Default: all classes.",
    ),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        metavar="SCALE", help="Scale of classifier-free guidance. Default: the pipeline's own."
    ),
]
Call = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Additional argument of the pipeline, such as height=512. Repeatable.",
    ),
]
MemoryMode = Annotated[
    str,
    typer.Option(
        metavar="MODE",
        help="fast, or low, which keeps only packed weights in memory and is slower.",
    ),
]
Batch = Annotated[
    int, typer.Option(help="Images sampled at a time; their noise does not depend on it.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
]


def scheduler_name(text: str) -> str | None:
    """Return the API's name of a scheduler, which is None for the pipeline's own."""
    return None if text == OWN_SCHEDULER else text


def conditions(
    prompt: list[str] | None,
    prompts: Path | None,
    label: list[int] | None,
    guidance: float | None,
    call: list[str] | None,
) -> dict[str, Any]:
    """Return the API's arguments `prompts`, `labels`, `guidance` and `call`.

    Raises:
        StepQuantError: the file `prompts` is unreadable or empty, or an entry of `call` is not of
            the form KEY=VALUE.
    """
    texts = list(prompt or [])
    if prompts is not None:
        try:
            lines = prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StepQuantError(
                f"--prompts '{prompts}' cannot be read ({error}): expected a text file in UTF-8 "
                "with one prompt per line"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise StepQuantError(f"--prompts '{prompts}' has no prompt: expected one per line")
        texts += found
    return {
        "prompts": texts,
        "labels": label,
        "guidance": guidance,
        "call": parse_settings(call or [], "--call", "height=512"),
    }


def parse_settings(
    texts: list[str],
    option: str = "--set",
    example: str = "block_distillation.iterations=300",
) -> dict[str, Any]:
    """Parse `["step.key=value", ...]` into a dictionary; values are YAML, and the last one wins.

    Raises:
        StepQuantError: a text has no key or no `=`, or its value is not YAML.
    """
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise StepQuantError(
                f"{option} '{text}' has no key or no '=': expected "
                f"{'step.' if option == '--set' else ''}key=value, such as {example}"
            )
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise StepQuantError(
                f"{option} '{text}' has a value that is not YAML: expected a number, a word or a "
                "list such as [1, 2]"
            ) from error
    return settings
