"""`--config` and `--lora`: from their texts to a pipeline that is open and has LoRAs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

if TYPE_CHECKING:  # slow to import, see demo.py
    from diffusers import DiffusionPipeline

Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="[NAME=]FILE[=SCALE]",
        help="LoRA beside the layers: a safetensors file, a folder with one, or a hub id; repeat.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="For a model that is one file: folder or hub id of a pipeline of its kind.",
    ),
]


def opened(config: str | None, reporter: Reporter, *models: str) -> list[str | DiffusionPipeline]:
    """`models`, those of them that are single files opened with `config`, where there is one."""
    if config is None:
        return list(models)
    files = [name for name in models if Path(name).expanduser().is_file()]
    if not files:
        raise StepQuantError(
            f"--config '{config}' was given for {' and '.join(repr(name) for name in models)}: "
            "expected it only for a model that is one safetensors file; a folder has its own"
        )
    from stepquant import api  # not at the top: see demo.py

    return [
        api.load(name, config=config, reporter=reporter) if name in files else name
        for name in models
    ]


@dataclass(frozen=True)
class Lora:
    """What `api.load_lora` takes."""

    source: str
    scale: float
    name: str


def parse_lora(text: str) -> Lora:
    """`[NAME=]FILE[=SCALE]`; the scale is 1 and the name that of the file unless they are given.

    A number behind the last `=` is the scale. A word before the first one is the name, so that
    a file with `=` in its own name is written as a path, `./a=b.safetensors`.
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
            f"--lora '{text}' names no file: expected [NAME=]FILE[=SCALE], as in "
            "styles/ink.safetensors=0.8"
        )
    if name is None:
        name = re.sub(r"\W+", "_", Path(source).name.removesuffix(".safetensors")) or "lora"
    return Lora(source, scale, name)


def with_loras(
    model: str | DiffusionPipeline, texts: list[str] | None, reporter: Reporter
) -> tuple[str | DiffusionPipeline, list[dict[str, Any]]]:
    """`model` opened and with the LoRAs of `texts`, or as it is where there are none; a record.

    The record has `name`, `source`, `scale` and `layers` (names) of each.
    """
    loras = [parse_lora(text) for text in texts or []]
    if not loras:
        return model, []
    from stepquant import api  # not at the top: see demo.py

    pipeline = api.load(model, reporter=reporter)
    records = []
    for lora in loras:
        layers = api.load_lora(pipeline, lora.source, lora.scale, lora.name)
        records.append(
            {"name": lora.name, "source": lora.source, "scale": lora.scale, "layers": layers}
        )
    return pipeline, records


def lora_line(record: dict[str, Any]) -> str:
    """What is printed of one entry of the record."""
    return (
        f"LoRA {record['name']}: {record['source']} with scale {record['scale']:g}, "
        f"{len(record['layers'])} layers"
    )
