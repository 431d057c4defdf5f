"""The demo: quantize an embedded model in four ways, compare them, and draw images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.engines.backend import with_captured_calls
from stepquant.evaluation import measure_latency
from stepquant.evaluation.metric import METRICS
from stepquant.pipelines.opening import (
    BUILTIN,
    builtin_names,
    default_features,
    float32_bytes,
    open_pipeline,
)
from stepquant.pipelines.resolved import denoiser_of
from stepquant.pipelines.sampling import sample_images
from stepquant.reporting.images import save_grid
from stepquant.support.atomic import atomic_write, check_new_folder
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter
from stepquant.verbs.bench import denoiser_call
from stepquant.verbs.evaluate import evaluate
from stepquant.verbs.quantize import quantize

PREFERRED = ("cifar10-ddpm", "fashion-ddpm")
STEPS = 50
TIMING_BATCH = 16
GRID_COLUMNS = 12
SHOWN = ("paired_psnr", "frechet_distance")  # metrics with a column of the table


@dataclass(frozen=True)
class Setting:
    """Recipe and bits of one quantized model of the demo."""

    recipe: str
    weights: int
    activations: int

    @property
    def label(self) -> str:
        """Name in the table, such as "dilatequant w4a8"."""
        return f"{self.recipe} w{self.weights}a{self.activations}"


SETTINGS = (
    Setting("minmax", 8, 8),
    Setting("minmax", 4, 4),
    Setting("dilatequant", 4, 8),
    Setting("dilatequant", 4, 4),
)


def demo_model() -> str:
    """Return the name of the embedded model for the demo.

    Raises:
        StepQuantError: this installation has none of the demo's models.
    """
    for name in PREFERRED:
        if name in builtin_names():
            return BUILTIN + name
    raise StepQuantError(
        "no embedded model is in this installation: expected one in stepquant/assets; install "
        "the package from its wheel or its repository"
    )


def demo(
    out: str | Path,
    images: int = 160,
    iterations: int = 100,
    reporter: Reporter | None = None,
    metrics: Sequence[str] = (),
) -> dict[str, Any]:
    """Quantize an embedded model by two recipes, and compare quality, speed and size.

    The new folder `out` gets the four quantized pipelines, `grid.png` (the float model's images
    above those of the quantized models, each column from the same noise) and `demo.json`, the
    returned record.

    Args:
        out: the new folder.
        images: number of images sampled with each model.
        iterations: iterations of block distillation. The recipe's own number is larger; with this
            one the demo takes minutes.
        reporter: where progress is shown; silent by default.
        metrics: names of metrics that get a column of their own in the table.

    Returns:
        The record, JSON values; its `table` has one row per model.

    Raises:
        StepQuantError: `out` exists, or a metric is unknown.
    """
    reporter = reporter or Reporter(quiet=True)
    shown = [METRICS.find(metric) for metric in dict.fromkeys((*SHOWN, *metrics))]
    folder = check_new_folder(out)
    name = demo_model()
    features = default_features(name)
    assert features is not None
    float_pipeline = open_pipeline(name)
    float_denoiser = denoiser_of(float_pipeline)
    reporter.line(f"{name}: {sum(p.numel() for p in float_denoiser.parameters()):,} parameters")
    float_images = sample_images(float_pipeline, images, STEPS, reporter=reporter)
    rows: list[dict[str, Any]] = []
    strips: list[Tensor] = [float_images[:GRID_COLUMNS]]
    calls = {"float32": denoiser_call(float_denoiser, TIMING_BATCH, 500)}
    for setting in SETTINGS:
        reporter.line(f"{setting.label}: quantizing")
        brief = {"block_distillation.iterations": iterations, "block_distillation.samples": 512}
        result = quantize(
            name,
            setting.recipe,
            setting.weights,
            setting.activations,
            folder / setting.label.replace(" ", "-"),
            STEPS,
            brief if setting.recipe == "dilatequant" else None,
            reporter=reporter,
        )
        drawn = sample_images(
            with_captured_calls(result.pipeline), images, STEPS, reporter=reporter
        )
        quality = evaluate(
            result.pipeline,
            float_pipeline,
            images,
            STEPS,
            features=features,
            images=drawn,
            float_images=float_images,
            reporter=reporter,
            metrics=metrics,
        )
        rows.append(
            {
                "model": setting.label,
                **dict(metric.cell(quality) for metric in shown),
                "ms_per_step": None,
                "times_faster": None,
                "bytes": result.record["checkpoint_bytes"],
                "times_smaller": result.record["times_smaller"],
                "quantize_s": result.record["seconds"],
                "peak_memory_mb": result.record["peak_memory_mb"],
            }
        )
        strips.append(drawn[:GRID_COLUMNS])
        calls[setting.label] = denoiser_call(denoiser_of(result.pipeline), TIMING_BATCH, 500)
    rows.insert(
        0,
        {
            "model": "float32",
            # All records have the same values of the float model.
            **{metric.cell(quality)[0]: metric.cell_of_float(quality) for metric in shown},
            "ms_per_step": None,
            "times_faster": 1.0,
            "bytes": float32_bytes(float_denoiser),
            "times_smaller": 1.0,
            "quantize_s": None,
            "peak_memory_mb": None,
        },
    )
    timings = measure_latency(calls, repeats=20)
    for row in rows:
        row["ms_per_step"] = timings[row["model"]].median_ms
        row["times_faster"] = timings["float32"].median_ms / row["ms_per_step"]
    labels = [row["model"] for row in rows]
    save_grid(torch.cat(strips), folder / "grid.png", GRID_COLUMNS, labels)
    record = {
        "model": name,
        "images": images,
        "sampler": f"ddim, {STEPS} steps",
        "timing": f"one denoiser call, batch {TIMING_BATCH}, eager, {torch.get_num_threads()} "
        "threads, medians of 20 interleaved runs",
        "iterations": iterations,
        "table": rows,
        "grid": str(folder / "grid.png"),
    }
    text = json.dumps(record, indent=2) + "\n"
    atomic_write(folder / "demo.json", lambda partial: partial.write_text(text))
    return record
