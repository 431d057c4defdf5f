"""`stepquant sample`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from stepquant.cli.opening import Config, Loras, lora_line, opened, with_loras
from stepquant.cli.options import (
    Batch,
    Call,
    Guidance,
    Json,
    Label,
    MemoryMode,
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
from stepquant.support.atomic import check_new_folder
from stepquant.support.errors import StepQuantError


def sample(
    context: typer.Context,
    model: Model,
    num: Annotated[int, typer.Option(help="Number of images.")] = 16,
    grid: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all images to one PNG file, replacing it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="New folder for single images.")
    ] = None,
    steps: Steps = 50,
    scheduler: Scheduler = "auto",
    seed: Annotated[int, typer.Option(help="Image i starts from the noise of seed + i.")] = 0,
    batch: Batch = 64,
    prompt: Prompt = None,
    prompts: Prompts = None,
    label: Label = None,
    guidance: Guidance = None,
    call: Call = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, native, onednn, int_mm, reference, openvino[:DEVICE], or fastest (the "
            "faster of auto and openvino).",
        ),
    ] = "auto",
    memory: MemoryMode = "fast",
    lora: Loras = None,
    config: Config = None,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Draw images with a float or a quantized model."""
    with talk(context, quiet, json_file) as output:
        if grid is None and out is None:
            raise StepQuantError(
                "the images have no destination: expected --grid FILE or --out DIR"
            )
        from stepquant import api
        from stepquant.engines.target import Engine, Target
        from stepquant.pipelines.resolved import denoiser_of
        from stepquant.reporting import images  # not at the top: see demo.py

        if grid is not None:
            images.check_picture_path(grid)
        if out is not None:
            check_new_folder(out)
        (pipeline,) = opened(config, output.reporter, model)
        pipeline, loras = with_loras(pipeline, lora, output.reporter)
        pipeline = api.load(pipeline, reporter=output.reporter)
        if memory != "fast":
            api.set_memory_mode(denoiser_of(pipeline), memory)
        drawn = api.sample(
            pipeline,
            num,
            steps,
            seed,
            scheduler_name(scheduler),
            batch,
            output.reporter,
            backend=backend,
            **conditions(prompt, prompts, label, guidance, call),
        )
        video = drawn.dim() == 5
        # Each frame of a video is a picture; a row of the grid is a video.
        frames = drawn.flatten(0, 1) if video else drawn
        files = [] if out is None else images.save_images(frames, out)
        if grid is not None:
            columns = drawn.shape[1] if video else math.ceil(math.sqrt(num))
            images.save_grid(frames, grid, columns=columns)
        shape = list(drawn.shape[1:])
        output.results = {"num": num, "shape": shape, "grid": grid, "out": out, "files": files}
        output.results["loras"] = loras
        packed_ran = Target.parse(backend).engine is Engine.LAYERS
        output.results["slow_paths"] = api.slow_paths(pipeline) if packed_ran else []
        sizes = dict(zip(("channels", "height", "width"), shape[-3:], strict=True))
        counts = {"videos": num, "frames": shape[0]} if video else {"images": num}
        output.table([{**counts, **sizes}])
        for entry in loras:
            output.line(lora_line(entry))
        for place in (grid, out):
            if place is not None:
                output.line(f"written to {place}")
        output.slow_paths(output.results["slow_paths"])
