"""Do two commits compute the same, byte for byte?

    python benchmarks/compare_commits.py 65124e7                 # and the working tree
    python benchmarks/compare_commits.py 65124e7 main --json both.json
    python benchmarks/compare_commits.py --against both.json     # its BASE is not computed again

Each side is a commit, or a folder with `src/stepquant` in it. Its sources go to a temporary folder,
and the native kernels are compiled there. One process for each side then quantizes tiny models with
random weights by every shipped recipe, packs them, loads the checkpoints and samples. Exits with 0
if both sides have equal rows, with 1 if rows differ or fail, with 2 if there is no comparison.

Only the process of a side imports stepquant, and only `stepquant.api`, so that the script serves
commits that have their modules in different places.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SCRIPT = Path(__file__).resolve()
ROWS = SCRIPT.with_name("commit_rows.py")
# The processes of a side: one thread, hashes in one order, no network, all kernels of the machine.
FIXED = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
DROPPED = ("STEPQUANT_NATIVE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
WORDS = ("refused", "failed")  # rows with one part, a sentence


class Incomparable(Exception):
    """Why there is no comparison, as a sentence."""


@dataclass
class Side:
    """A commit or folder, and what was computed with its sources in `source`."""

    name: str
    commit: str | None
    source: Path
    record: dict[str, Any] = field(default_factory=dict)


@contextmanager
def checked_out(name: str, scratch: Path) -> Iterator[Side]:
    """The commit or folder `name`, with sources of its own below `scratch`."""
    folder, target = Path(name).resolve(), scratch / "checkout"
    if (folder / "src" / "stepquant").is_dir():
        # A copy: compiling replaces a library that others may be using in `folder`.
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(folder / "src", target / "src", ignore=ignored)
        yield Side(name, commit_of(folder), target / "src")
        return
    commit = git("rev-parse", "--verify", f"{name}^{{commit}}")
    git("worktree", "add", "--detach", str(target), commit)
    try:
        yield Side(name, commit, target / "src")
    finally:
        git("worktree", "remove", "--force", str(target))


def git(*words: str, folder: Path = SCRIPT.parent) -> str:
    """The output of a git command."""
    command = ["git", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Incomparable(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
    return done.stdout.strip()


def commit_of(folder: Path) -> str | None:
    """The commit of `folder`, marked where its sources differ from it; None outside git."""
    try:
        changed = git("status", "--porcelain", "--", "src", folder=folder)
        return git("rev-parse", "HEAD", folder=folder) + ("-dirty" if changed else "")
    except Incomparable:
        return None


def environment(source: Path) -> dict[str, str]:
    """Of a process with the package in `source`."""
    kept = {key: value for key, value in os.environ.items() if key not in DROPPED}
    return {**kept, **FIXED, "PYTHONPATH": str(source)}


def compile_kernels(source: Path) -> str:
    """Compile the native kernels, wherever the package has them: "compiled", or why there are none.

    The module to run is the package with `build.py` and `__main__.py`, whatever its name is.
    """
    found = [path.parent for path in source.rglob("build.py")]
    found = [folder for folder in found if (folder / "__main__.py").is_file()]
    if len(found) != 1:
        raise Incomparable(
            f"'{source}' has {len(found)} packages with build.py and __main__.py: expected one, "
            "which compiles the native kernels"
        )
    module = ".".join(found[0].relative_to(source).parts)
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=source,
        env=environment(source),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return "compiled"
    return (done.stderr.strip() or f"{module} ended with {done.returncode}").splitlines()[-1]


def compute(side: Side, folder: Path, models: list[str], recipes: list[str]) -> None:
    """Compile the side's kernels and compute its rows in `folder`, with a bar of time left."""
    folder.mkdir(parents=True)
    console = Console(stderr=True)
    command = [sys.executable, str(ROWS), str(side.source)]
    command += [f"--model={name}" for name in models] + [f"--recipe={name}" for name in recipes]
    record = {"name": side.name, "commit": side.commit, "native": compile_kernels(side.source)}
    started, rows, log = time.monotonic(), [], folder / "log.txt"
    with (
        Progress(
            TextColumn(f"{side.name:<34}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as progress,
        log.open("w") as errors,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment(side.source),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        task, about = progress.add_task("", total=None, note=""), process.stdout.readline()
        record |= json.loads(about or "{}")
        progress.update(task, total=record.get("todo"))
        for line in process.stdout:
            rows.append(json.loads(line))
            progress.update(task, advance=1, note="{model}, {recipe}".format(**rows[-1]))
    if process.returncode != 0:
        last = "\n".join(log.read_text().splitlines()[-20:])
        raise Incomparable(f"the process of '{side.name}' ended with {process.returncode}:\n{last}")
    record["seconds"] = round(time.monotonic() - started, 1)
    console.print(f"{side.name}: {len(rows)} rows, {record['seconds']:.0f} s", highlight=False)
    side.record = {**record, "rows": rows}


def recorded(file: Path, models: list[str], recipes: list[str]) -> Side:
    """The BASE of a file that `--json` wrote, as far as it is asked for."""
    try:
        record = json.loads(file.read_text())["base"]
        rows = [row for row in record["rows"] if not models or row["model"] in models]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Incomparable(f"'{file}' is no file that --json wrote: {error!r}") from error
    rows = [row for row in rows if not recipes or row["recipe"] in recipes]
    return Side(record["name"], record["commit"], Path(), {**record, "rows": rows})


def check_comparable(base: Side, head: Side) -> None:
    """An error where the sides differ in what is not their code."""
    ours, theirs = head.record, base.record
    for key in ("machine", "settings"):
        if ours[key] != theirs[key]:
            raise Incomparable(
                f"'{base.name}' was computed with the {key} {theirs[key]}: expected those of "
                f"'{head.name}', {ours[key]}"
            )
    for name, digest in ours["models"].items():
        if theirs["models"].get(name, digest) != digest:
            raise Incomparable(
                f"the model '{name}' has other weights or files in '{base.name}' than in "
                f"'{head.name}': expected the same"
            )
    if not ours["rows"] and not theirs["rows"]:
        raise Incomparable("neither side has a row of the models and recipes that were asked for")


def compare(base: Side, head: Side) -> list[dict[str, str]]:
    """Verdicts, one for each row of either side."""
    sides = [
        {(row["model"], row["recipe"]): row["parts"] for row in side.record["rows"]}
        for side in (base, head)
    ]
    for side, rows in zip((base, head), sides, strict=True):
        rows["both", "native kernels"] = {"native kernels": side.record["native"]}
    verdicts = []
    for model, recipe in {**sides[0], **sides[1]}:
        verdict, detail = judge(*(rows.get((model, recipe)) for rows in sides))
        verdicts.append({"model": model, "recipe": recipe, "verdict": verdict, "detail": detail})
    return verdicts


def judge(base: dict[str, str] | None, head: dict[str, str] | None) -> tuple[str, str]:
    """The verdict on the parts of a row, and what there is to say of it."""
    if base is None or head is None:
        return f"only in {'HEAD' if base is None else 'BASE'}", ""
    if base != head:
        names = [name for name in {**base, **head} if base.get(name) != head.get(name)]
        words = [base.get(name, head.get(name)) for name in names if name in WORDS]
        return "different", " ".join("; ".join([*names, *words]).split())
    for name in WORDS:
        if name in base:
            return name, " ".join(base[name].split())
    return "same", ""


def table(verdicts: list[dict[str, str]]) -> str:
    """A markdown table of the verdicts."""
    lines = ["| model | recipe | verdict | |", "|---|---|---|---|"]
    lines += ["| {model} | {recipe} | {verdict} | {detail} |".format(**row) for row in verdicts]
    return "\n".join(lines)


def main() -> int:
    """Compute, compare, print; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        usage="%(prog)s [options] BASE [HEAD]\n       %(prog)s [options] --against FILE [HEAD]",
    )
    parser.add_argument(
        "sides",
        nargs="*",
        metavar="BASE, HEAD",
        help="commits, or folders with src/stepquant; HEAD is the working tree unless named",
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="BASE from what --json wrote")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all digests")
    parser.add_argument("--model", action="append", help="not all; can be repeated")
    parser.add_argument("--recipe", action="append", help="not all; can be repeated")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new folder for checkpoints")
    args = parser.parse_args()
    models, recipes = args.model or [], args.recipe or []
    names = [*args.sides] if args.against is None else [None, *args.sides]
    if not 1 <= len(names) <= 2:
        parser.error("expected BASE and HEAD, or only BASE; with --against HEAD, or nothing")
    names = [*names, str(SCRIPT.parents[1])][:2]
    try:
        if args.keep is not None and args.keep.exists():
            raise Incomparable(
                f"'{args.keep}' exists: expected a new folder to keep checkpoints in"
            )
        sides = []
        for name, label in zip(names, ("base", "head"), strict=True):
            if name is None:
                sides.append(recorded(args.against, models, recipes))
                continue
            with TemporaryDirectory() as folder:
                scratch = Path(folder).resolve()
                with checked_out(name, scratch) as side:
                    compute(side, (args.keep or scratch).resolve() / label, models, recipes)
                sides.append(side)
        check_comparable(*sides)
    except Incomparable as error:
        print(error, file=sys.stderr)
        return 2
    verdicts = compare(*sides)
    if args.json is not None:
        found = {"base": sides[0].record, "head": sides[1].record, "verdicts": verdicts}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    for label, side in zip(("BASE", "HEAD"), sides, strict=True):
        print(f"{label}: {side.name}, commit {side.record['commit']}")
    print(table(verdicts))
    counts = Counter(row["verdict"] for row in verdicts)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 0 if counts.keys() <= {"same", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
