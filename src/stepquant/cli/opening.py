"""The options `--config` and `--lora`, and how they open a pipeline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:  # slow to import, see demo.py
    from diffusers import DiffusionPipeline

Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="[NAME=]FILE[=SCALE]",
        help="LoRA to load: a safetensors file, a folder with one, or a hub id. Repeatable.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="Only if the model is a single file: a folder or hub id of the same kind of pipeline.",
    ),
]


def opened(config: str | None, *models: str) -> list[str | DiffusionPipeline]:
    """Return `models`, with single files among them opened with `config` unless it is None.

    Raises:
        StepQuantError: `config` is given, but no model is a single file.
    """
    if config is None:
        return list(models)
    files = [name for name in models if Path(name).expanduser().is_file()]
    if not files:
        raise StepQuantError(
            f"--config '{config}' was given for {' and '.join(repr(name) for name in models)}: "
            "expected a model that is a single safetensors file; leave out --config, as a folder "
            "has its own"
        )
    from stepquant import api  # not at the top: see demo.py

    return [api.load(name, config=config) if name in files else name for name in models]


@dataclass(frozen=True)
class Lora:
    """The arguments of `api.load_lora`."""

    source: str
    scale: float
    name: str


def parse_lora(text: str) -> Lora:
    """Parse `[NAME=]FILE[=SCALE]`. By default the scale is 1 and the name is that of the file.

    A number after the last `=` is the scale, and a word before the first `=` is the name. A file
    with `=` in its name must therefore be written as a path, `./a=b.safetensors`.

    Raises:
        StepQuantError: `text` has no file.
    """
    source, name, scale = text, None, 1.0
    before, equals, last = source.rpartition("=")
    if equals:
        try:
            source, scale = before, float(last)
        except ValueError:
            source = text
    first, equals, rest = source.partition("=")
    if equals and re.fullmatch(r"\w[\w-]*", first):
        name, source = first, rest
    if not source:
        raise StepQuantError(
            f"--lora '{text}' names no file: expected [NAME=]FILE[=SCALE], such as "
            "styles/ink.safetensors=0.8"
        )
    if name is None:
        name = re.sub(r"\W+", "_", Path(source).name.removesuffix(".safetensors")) or "lora"
    return Lora(source, scale, name)


def with_loras(
    model: str | DiffusionPipeline, texts: list[str] | None
) -> tuple[str | DiffusionPipeline, list[dict[str, Any]]]:
    """Open `model` and load the LoRAs of `texts`; without any, return `model` unchanged.

    Returns:
        The model, and for each LoRA its `name`, `source`, `scale` and `layers` (their names).
    """
    loras = [parse_lora(text) for text in texts or []]
    if not loras:
        return model, []
    from stepquant import api  # not at the top: see demo.py

    pipeline = api.load(model)
    records = []
    for lora in loras:
        layers = api.load_lora(pipeline, lora.source, lora.scale, lora.name)
        records.append(
            {"name": lora.name, "source": lora.source, "scale": lora.scale, "layers": layers}
        )
    return pipeline, records


def lora_line(record: dict[str, Any]) -> str:
    """Return the line of output for one entry of the record."""
    return (
        f"LoRA {record['name']}: {record['source']} with scale {record['scale']:g}, "
        f"{len(record['layers'])} layers"
    )
