"""`stepquant bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from stepquant.cli.opening import Config, opened
from stepquant.cli.options import Against, Json, MemoryMode, Model, Quiet
from stepquant.cli.session import talk


def bench(
    context: typer.Context,
    model: Model,
    against: Against,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Batch size to time. Repeatable.", show_default="1, 4 and 16"),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, native, onednn, int_mm or reference; openvino[:DEVICE] is timed in "
            "addition to auto.",
        ),
    ] = "auto",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also time torch.compile, which takes minutes.")
    ] = False,
    memory: MemoryMode = "fast",
    repeats: Annotated[
        int, typer.Option(help="Timed rounds; each round calls every model once.")
    ] = 20,
    config: Config = None,
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time one denoiser call of a quantized model and of its float model."""
    with talk(context, quiet, json_file) as output:
        from stepquant import api  # not at the top: see demo.py

        ours, theirs = opened(config, model, against)
        record = api.bench(
            ours,
            theirs,
            batch or (1, 4, 16),
            backend,
            compiled,
            repeats,
            output.reporter,
            memory=memory,
        )
        output.results = record
        output.table(record["rows"])
        kernels = ", ".join(f"{name} {count}" for name, count in record["kernels"].items())
        layers = f"layer inputs by kernel: {kernels}" if kernels else f"{record['kind']} layers"
        output.line(
            f"{layers}; {record['threads']} threads, "
            f"{record['cpu_capability']}, peak memory {record['peak_memory_mb']:.0f} MB"
        )
        if record["openvino"] is not None:
            found = record["openvino"]
            kernels = ", ".join(f"{name} {count}" for name, count in found["kernels"].items())
            output.line(f"OpenVINO's kernels on {found['device']}: {kernels}")
            for entry in found["faster"]:
                output.line(f"faster at batch {entry['batch']} on this machine: {entry['model']}")
        weights = record["weights"]
        output.line(
            f"weights in memory: {weights['resident_bytes'] / 1e6:.2f} MB instead of "
            f"{weights['float32_bytes'] / 1e6:.2f} MB in float32, {weights['times_smaller']:.2f} "
            "times smaller"
        )
        output.slow_paths(record["slow_paths"])
