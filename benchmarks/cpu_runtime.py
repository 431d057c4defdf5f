"""Whole denoiser calls on the CPU, side by side: torch, stepquant and OpenVINO with NNCF's INT8.

    python benchmarks/cpu_runtime.py
    python benchmarks/cpu_runtime.py --footprint
    python benchmarks/cpu_runtime.py --small --no-compile  # toy sizes, to try the script

One process for each model and batch runs all engines in turns; with `--footprint`, one for each
model and engine loads from disk, calls once and looks at its memory. Each writes a cell file, so a
grid that was stopped goes on where it was. Writes `cpu_runtime.json` and `cpu_runtime.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from cpu_engines import ENGINES
from cpu_grid import Cell, is_finished
from cpu_tables import footprint_table, timing_table
from records import write_record
from speed_files import Subject, is_made, make, needed
from speed_models import MODELS
from stepquant.support.atomic import atomic_write
from stepquant.support.errors import StepQuantError
from stepquant.support.progress import Reporter

CELLS = Path("runs/cpu_runtime")
RESULTS = Path("benchmarks/results")


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The grid that the arguments ask for, model by model."""
    engines = [
        name for name in args.engine or ENGINES if not (args.no_compile and ENGINES[name].compiles)
    ]
    if not engines:
        raise SystemExit("--no-compile leaves no engine: expected one that does not compile")
    if not args.footprint and "float32" not in engines:
        engines.insert(0, "float32")  # what all are compared with
    found = []
    for model in args.model or MODELS:
        subject = Subject(model, args.small, args.layers, args.tables, args.seed)
        if args.footprint:
            settings: dict[str, Any] = {"threads": args.threads}
            found += [Cell("footprint", subject, 1, (name,), settings) for name in engines]
            continue
        settings = {
            "repeats": args.repeats,
            "warmup": args.warmup,
            "leads": args.leads,
            "threads": args.threads,
        }
        for batch in args.batch or MODELS[model].batches:
            found.append(Cell("timing", subject, batch, tuple(engines), settings))
    return found


def run_child(arguments: list[str], what: str, reporter: Reporter) -> bool:
    """This script once more, for one piece; whether it ended well."""
    done = subprocess.run([sys.executable, __file__, *arguments])
    if done.returncode:
        reporter.line(f"{what}: failed with code {done.returncode}, see above")
    return done.returncode == 0


def run_grid(cells: list[Cell], args: argparse.Namespace, arguments: list[str]) -> bool:
    """Make the files and run the cells that are not there yet, one process after another."""
    reporter, fine = Reporter(), True
    todo = [cell for cell in cells if not is_finished(cell, args.cells)]
    for number, cell in enumerate(todo, 1):
        models = args.cells / "models" / cell.subject.label
        chosen = ["--child-model", cell.subject.model]
        missing = [
            file
            for file in needed({ENGINES[name].files for name in cell.engines})
            if not is_made(cell.subject, models, file)
        ]
        # Toy models in one process, which mostly imports; large ones each with memory of its own.
        for files in [missing] if args.small and missing else [[file] for file in missing]:
            what = f"{', '.join(files)} of {cell.subject.label}"
            reporter.line(f"making {what}")
            more = [word for file in files for word in ("--file", file)]
            made = run_child([*arguments, *chosen, "--child", "make", *more], what, reporter)
            fine &= made
        # An engine whose file cannot be made is an error in its row, but nothing goes without this.
        if not is_made(cell.subject, models, "float32"):
            continue
        reporter.line(f"[{number}/{len(todo)}] {cell.name}")
        more = ["--child", cell.kind, "--child-batch", str(cell.batch)]
        for name in cell.engines:
            more += ["--child-engine", name]
        fine &= run_child([*arguments, *chosen, *more], cell.name, reporter)
    return fine


def child(args: argparse.Namespace) -> None:
    """One piece: the making of a file, or a cell."""
    torch.set_num_threads(args.threads)
    subject = Subject(args.child_model, args.small, args.layers, args.tables, args.seed)
    models = args.cells / "models" / subject.label
    if args.child == "make":
        for file in args.file:
            make(subject, models, file)
        return
    # Not at the top: footprints are told from what is loaded already.
    from cpu_cells import footprint_record, timing_record

    args.engine = args.child_engine
    args.model, args.batch = [args.child_model], [args.child_batch]
    args.footprint = args.child == "footprint"
    (cell,) = cells_of(args)
    measure = footprint_record if args.footprint else timing_record
    record = {**cell.identity(), **measure(cell, models, args.small)}
    write_record(record, args.cells / f"{cell.name}.json")


def report(folder: Path, out: Path) -> None:
    """All cells in `folder` as one JSON file and one file of tables, which are printed."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    order = {name: number for number, name in enumerate(MODELS)}

    def place(record: dict[str, Any]) -> tuple[Any, ...]:
        model = next((name for name in order if record["model"].startswith(name)), "")
        engine = list(ENGINES).index(record["engines"][0])
        return order.get(model, 99), record["model"], record["batch"], engine

    records.sort(key=place)
    timings = [record for record in records if record["kind"] == "timing"]
    footprints = [record for record in records if record["kind"] == "footprint"]
    write_record({"timings": timings, "footprints": footprints}, out)
    tables = "\n".join(
        table
        for table in (
            timing_table(timings) if timings else "",
            footprint_table(footprints) if footprints else "",
        )
        if table
    )
    atomic_write(out.with_suffix(".md"), lambda path: path.write_text(tables))
    print(tables)


def parse() -> argparse.Namespace:
    """The arguments, with what small sizes change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="default: all")
    parser.add_argument("--batch", type=int, action="append", help="default: the model's own")
    parser.add_argument("--layers", type=int, default=None, help="of dit-xl, instead of its 28")
    parser.add_argument("--tables", action="store_true", help="paper: a step table of 100 rows")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--footprint", action="store_true", help="memory and load time instead")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--leads", type=int, default=2, help="calls right before a timed one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="toy sizes, to try the script")
    parser.add_argument("--cells", type=Path, default=None, help=f"default: {CELLS}")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child-model", help=argparse.SUPPRESS)
    parser.add_argument("--child-batch", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--child-engine", action="append", help=argparse.SUPPRESS)
    parser.add_argument("--file", action="append", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("layers", "repeats", "threads", *(["batch"] if args.batch else [])):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                parser.error(f"--{name} is {number}: expected one or more")
    # Toy figures never come between the real ones.
    args.cells = args.cells or (Path(f"{CELLS}_small") if args.small else CELLS)
    args.out = args.out or (args.cells / "report" if args.small else RESULTS) / "cpu_runtime.json"
    return args


def main() -> None:
    """Run what is missing of the grid, then put all cells together."""
    args = parse()
    if args.child:
        try:
            child(args)
        except StepQuantError as error:
            raise SystemExit(str(error)) from error
        return
    args.cells.mkdir(parents=True, exist_ok=True)
    cells = cells_of(args)
    fine = run_grid(cells, args, sys.argv[1:])
    if not any(args.cells.glob("*.json")):
        raise SystemExit("no cell was measured: see the errors above")
    report(args.cells, args.out)
    if not fine:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
