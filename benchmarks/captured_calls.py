"""Five ways to call a packed denoiser: call by call, kept memory, compiled, exported, captured.

    python benchmarks/captured_calls.py --model embedded --model paper
    python benchmarks/captured_calls.py --model embedded --way captured  # to try the script

Each way runs in a process of its own on one thread, in turns, `--rounds` times; the exported one,
which takes minutes to get ready, in the first round only. A call's time is the processor time of
its process, so that work beside it counts less. Writes `captured_calls.json`; rows of other models
and ways that the file has stay.

Kept memory is glibc's allocator told never to return memory to the system: what the arena of a
captured call gains without the replay. The exported way is `torch.export`, then AOTInductor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from cells import machine
from records import write_record
from speed_files import Positional, Subject, load_denoiser, make, needed, read_config
from speed_models import MODELS, Inputs, call, random_inputs
from stepquant.engines.captured_calls import recorded
from stepquant.support.process_memory import peak_memory_mb
from stepquant.support.progress import Reporter

MODELS_FOLDER = Path("runs/cpu_runtime/models")
RESULTS = Path("benchmarks/results")
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "1048576",
}

Way = Callable[[nn.Module, Inputs], Callable[[], Tensor]]


def _eager(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    return lambda: call(model, inputs)


def _captured(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    replaying: Any = recorded(model)
    return lambda: call(replaying, inputs)


def _compiled(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    compiled: Any = torch.compile(model, dynamic=False)
    return lambda: call(compiled, inputs)


def _exported(model: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    call(model, inputs)  # lays the weights out
    arguments = tuple(inputs.tensors())
    program = torch.export.export(
        Positional(model, list(inputs.conditions)).eval(), arguments, strict=True
    )
    with TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder, "model.pt2"))
        )
        package: Any = torch._inductor.aoti_load_package(path)
    return lambda: package(*arguments)


WAYS: dict[str, Way] = {
    "call by call": _eager,
    "kept memory": _eager,
    "compiled": _compiled,
    "exported": _exported,
    "captured": _captured,
}


def measure(way: str, models: Path, batch: int, repeats: int) -> dict[str, Any]:
    """One round of one way, in this process."""
    torch.set_num_threads(1)
    inputs = random_inputs(read_config(models), batch)
    model = load_denoiser(models / "w8a8")
    with torch.no_grad():
        expected = call(model, inputs)
        started = time.process_time()
        run = WAYS[way](model, inputs)
        y = run()
        for _ in range(2):  # the second call is the one that is captured
            y = run()
        ready = time.process_time()
        seconds = []
        for _ in range(repeats):
            before = time.process_time()
            run()
            seconds.append(time.process_time() - before)
    return {
        "setup_seconds": ready - started,
        "milliseconds": [1e3 * each for each in seconds],
        "largest_difference": float((y - expected).abs().max()),
        "peak_memory_mb": round(peak_memory_mb(), 1),
    }


def in_a_process(way: str, models: Path, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own; {"error": ...} where it fails or takes too long."""
    command = [sys.executable, __file__, "--child", way, "--models", str(models)]
    command += ["--batch", str(batch), "--repeats", str(args.repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if way == "kept memory":
        environment |= KEEP_MEMORY
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=args.limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not ready within {args.limit} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(model: str, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way, of all rounds."""
    subject = Subject(model, small=args.small)
    models = args.folder / subject.label
    for file in needed({"w8a8"}):
        make(subject, models, file)
    reporter = Reporter()
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in args.way or WAYS}
    for number in range(args.rounds):
        for way, found in rounds.items():
            if any("error" in each for each in found) or (found and way == "exported"):
                continue
            found.append(in_a_process(way, models, batch, args))
            what = found[-1].get("error") or f"{min(found[-1]['milliseconds']):.1f} ms"
            reporter.line(f"{subject.label} b{batch} round {number}: {way}: {what}")
    rows = []
    for way, found in rounds.items():
        row: dict[str, Any] = {"model": subject.label, "batch": batch, "way": way}
        errors = [each["error"] for each in found if "error" in each]
        if errors:
            rows.append({**row, "error": errors[0]})
            continue
        best = [min(each["milliseconds"]) for each in found]
        rows.append(
            {
                **row,
                "milliseconds": min(best),
                "milliseconds_of_rounds": best,
                "median_ms": statistics.median(t for each in found for t in each["milliseconds"]),
                "setup_seconds": min(each["setup_seconds"] for each in found),
                "largest_difference": max(each["largest_difference"] for each in found),
                "peak_memory_mb": max(each["peak_memory_mb"] for each in found),
                "repeats": args.repeats,
                "rounds": args.rounds,
            }
        )
    return rows


def merged(known: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`known` rows with `new` ones in the place of those of the same model, batch and way."""

    def key(row: dict[str, Any]) -> tuple[int, int, int]:
        return list(MODELS).index(row["model"]), row["batch"], list(WAYS).index(row["way"])

    return [row for _, row in sorted({key(row): row for row in [*known, *new]}.items())]


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all")
    parser.add_argument("--batch", type=int, action="append", help="default: 1 and 4")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1800, help="seconds for a round of one way")
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--folder", type=Path, default=MODELS_FOLDER)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.models, args.batch[0], args.repeats)))
        return
    file = args.out / "captured_calls.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for model in args.model or MODELS:
        for batch in args.batch or (1, 4):
            rows = merged(rows, rows_of(model, batch, args))
            write_record({"machine": machine(), "seed": 0, "rows": rows}, file)


if __name__ == "__main__":
    main()
