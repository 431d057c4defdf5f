"""One cell of a quality grid: quantize, sample on the packed runtime, judge, write one JSON file.

Shared by `quality.py` and the ablations. Cells are files, so a grid that was stopped goes on where
it was, and several processes can work on one grid.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import platform
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import stepquant
from stepquant.evaluation import load_features
from stepquant.evaluation.metrics.class_shares import class_shares
from stepquant.evaluation.metrics.frechet import distances
from stepquant.methods.recipe import parse_recipe
from stepquant.pipelines.conditioning import Conditioning
from stepquant.pipelines.opening import default_conditions, default_features, open_pipeline
from stepquant.pipelines.resolved import denoiser_of
from stepquant.pipelines.sampling import AUTO, sample_images
from stepquant.support.atomic import atomic_write
from stepquant.support.process_memory import peak_memory_mb
from stepquant.support.progress import Reporter
from stepquant.support.work_folder import fingerprint
from stepquant.verbs.evaluate import evaluate
from stepquant.verbs.quantize import quantize

BUDGETS = {"cpu": {"num": 2048, "steps": 50}, "gpu": {"num": 10_000, "steps": 100}}


@dataclass(frozen=True)
class Cell:
    """What is measured; `recipe` is a resolved recipe's plain values, None for the float model.

    `scheduler` and `steps` draw the images; what is calibrated for stands in the recipe. `guidance`
    is for both, instead of the scale that an embedded model comes with.
    """

    name: str
    model: str
    recipe: dict[str, Any] | None
    num: int
    steps: int
    seed: int = 0
    threads: int = 1
    scheduler: str | None = AUTO
    guidance: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def slug(label: str) -> str:
    """A cell's name from what its row is called."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    cpu = platform.processor() or platform.machine()
    for line in (
        Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    ):
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    packages = ("stepquant", "torch", "diffusers", "torchmetrics", "numpy")
    return {
        "commit": commit(),
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def commit() -> str | None:
    """The commit of the package that is imported, marked where code differs from it.

    None outside git, as where the package is installed for good.
    """
    package = Path(stepquant.__file__).resolve().parent
    code = ("src", "training", "benchmarks/*.py")

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=package, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        root = git("rev-parse", "--show-toplevel")
        changed = git("-C", root, "status", "--porcelain", "--", *code)
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def subject(model: str) -> str:
    """A digest of what is measured and with what: weights, scheduler, conditions, features."""
    pipeline = open_pipeline(model)
    denoiser = denoiser_of(pipeline)
    digest = hashlib.sha256(fingerprint(dict(denoiser.state_dict())).encode())
    for _, part in sorted(pipeline.components.items()):
        if isinstance(part, torch.nn.Module) and part is not denoiser:
            digest.update(fingerprint(dict(part.state_dict())).encode())
    digest.update(pipeline.scheduler.to_json_string().encode())
    conditions = default_conditions(model)
    if conditions.classes:
        digest.update(json.dumps(asdict(conditions)).encode())
    features = default_features(model)
    if features is not None:
        network = load_features(features)
        digest.update(fingerprint(dict(network.network.state_dict())).encode())
        digest.update(fingerprint(network.reference or {}).encode())
    return digest.hexdigest()[:16]


def conditioning_of(cell: Cell) -> Conditioning:
    """The conditions that an embedded model comes with, at the cell's scale of guidance."""
    own = default_conditions(cell.model).conditioning
    return own if cell.guidance is None else replace(own, guidance=cell.guidance)


def float_images(cell: Cell, folder: Path) -> torch.Tensor:
    """The float model's images for the cell's settings, sampled once for all cells."""
    name = cell.model.replace(":", "-").replace("/", "-")
    name += f"-{subject(cell.model)}-{cell.num}-{cell.steps}-{cell.seed}"
    name += "" if cell.scheduler == AUTO else f"-{cell.scheduler}"
    name += "" if cell.guidance is None else f"-guidance{cell.guidance:g}"
    file = folder / f"{name}.safetensors"
    if not file.exists():
        images = sample_images(
            open_pipeline(cell.model),
            cell.num,
            cell.steps,
            cell.seed,
            cell.scheduler,
            conditioning=conditioning_of(cell),
        )
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(file, lambda partial: save_file({"images": images}, partial))
    return load_file(file)["images"]


def is_finished(cell: Cell, file: Path) -> bool:
    """Whether `file` holds the record of `cell`; a record of other settings is an error."""
    if not file.exists():
        return False
    record = json.loads(file.read_text())
    settings = {**json.loads(json.dumps(asdict(cell))), "subject": subject(cell.model)}
    record = {"scheduler": AUTO, "guidance": None, **record}  # not in older records
    for key in ("model", "recipe", "num", "steps", "seed", "scheduler", "guidance", "subject"):
        if record.get(key) != settings[key]:
            raise SystemExit(
                f"'{file}' was measured with another {key}: expected that of cell '{cell.name}'; "
                "delete it or choose another --cells folder"
            )
    return True


def run_cell(cell: Cell, out: Path, cache: Path) -> Path:
    """Measure `cell` and write `out/NAME.json`; a file that exists is kept."""
    file = out / f"{cell.name}.json"
    if is_finished(cell, file):
        return file
    torch.set_num_threads(cell.threads)
    features = default_features(cell.model)
    if features is None:
        raise SystemExit(f"no feature network is known for '{cell.model}'")
    reference = images = float_images(cell, cache)
    conditioning = conditioning_of(cell)
    given = {
        "prompts": conditioning.prompts,
        "labels": conditioning.labels,
        "guidance": conditioning.guidance,
    }
    record: dict[str, Any] = {
        **asdict(cell),
        "subject": subject(cell.model),
        "machine": machine(),
    }
    if cell.recipe is None:
        record["quality"] = distances(reference, reference, features)
    else:
        recipe = parse_recipe(cell.recipe, f"cell '{cell.name}'")
        # One float pipeline for both, so that no cell pays for loading twice.
        pipeline = open_pipeline(cell.model)
        with TemporaryDirectory() as scratch:
            out_folder = Path(scratch) / "packed"
            result = quantize(pipeline, recipe, out=out_folder, seed=cell.seed, **given)
        record["quantize"] = result.record
        images = sample_images(
            result.pipeline,
            cell.num,
            cell.steps,
            cell.seed,
            cell.scheduler,
            conditioning=conditioning,
        )
        record["quality"] = evaluate(
            result.pipeline,
            pipeline,
            cell.num,
            cell.steps,
            cell.scheduler,
            features=features,
            seed=cell.seed,
            images=images,
            float_images=reference,
            **given,
        )
    conditions = default_conditions(cell.model)
    if conditions.classes:
        asked = conditions.classes_of(cell.num)
        record["quality"].update(class_shares(images, reference, asked, features))
    record["peak_memory_mb"] = peak_memory_mb()
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record) + "\n"
    atomic_write(file, lambda partial: partial.write_text(text))
    return file


def run_grid(cells: list[Cell], out: Path, cache: Path, jobs: int) -> None:
    """Run all cells, `jobs` at a time, each in a process of its own (peak memory is its own)."""
    todo = [cell for cell in cells if not is_finished(cell, out / f"{cell.name}.json")]
    reporter = Reporter()
    drawn = {(cell.model, cell.scheduler, cell.steps, cell.guidance): cell for cell in todo}
    for cell in drawn.values():
        float_images(cell, cache)  # before the workers want it all at once
    context = multiprocessing.get_context("spawn")
    with (
        reporter.task("cells", total=len(todo)) as task,
        ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        futures = [pool.submit(run_cell, cell, out, cache) for cell in todo]
        for future in futures:
            task.advance(note=future.result().name)


def read_cells(out: Path, cells: list[Cell]) -> list[dict[str, Any]]:
    """The records of `cells` that are finished, in order."""
    files = [out / f"{cell.name}.json" for cell in cells]
    return [json.loads(file.read_text()) for file in files if file.exists()]


def report(
    cells: list[Cell],
    folder: Path,
    jobs: int,
    out: Path,
    tabulate: Callable[[list[dict[str, Any]]], str] | None = None,
) -> None:
    """Run what is left of `cells`, then write `out.jsonl` and `out.md` and print the table.

    `tabulate`: from records to markdown, in the place of `table`.
    """
    run_grid(cells, folder, folder / "cache", jobs)
    records = read_cells(folder, cells)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_lines(records, out.with_suffix(".jsonl"))
    text = (tabulate or table)(records)
    atomic_write(out.with_suffix(".md"), lambda partial: partial.write_text(text))
    print(text)


def write_lines(records: list[dict[str, Any]], file: Path) -> None:
    """All records as JSON lines."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    atomic_write(file, lambda partial: partial.write_text(text))


def table(records: list[dict[str, Any]]) -> str:
    """A markdown table of the quality records."""
    features = records[0]["quality"]["features"]
    fd = f"fd_{features}"
    lines = [
        f"| model | bits | {fd} (95 %) | ratio to float | excess | {fd} to float's images "
        "| PSNR dB | SSIM | times smaller | quantize s | peak MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        quality = record["quality"]
        low, high = quality[f"{fd}_interval"]
        own = f"{quality[fd]:.4f} ({low:.4f} to {high:.4f})"
        if record["recipe"] is None:
            lines.append(f"| float32 | 32 | {own} | 1 | 0 | | | | 1 | | |")
            continue
        made = record["quantize"]
        excess = f"{quality[fd] - quality[f'{fd}_of_float']:.4f}"
        label = record["extra"].get("label", record["recipe"]["name"])
        lines.append(
            f"| {label} | {made['bits']} | {own} | {quality[f'{fd}_ratio']:.2f} | {excess} | "
            f"{quality[f'{fd}_to_float']:.4f} | {quality['paired_psnr_db']:.1f} | "
            f"{quality['paired_ssim']:.3f} | {made['times_smaller']:.2f} | {made['seconds']:.0f} | "
            f"{made['peak_memory_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"
