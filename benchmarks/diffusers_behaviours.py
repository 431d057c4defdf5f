"""Which behaviours that users of diffusers rely on work for which kind of quantized model.

    python benchmarks/diffusers_behaviours.py                      # float and stepquant's own kinds
    python benchmarks/diffusers_behaviours.py --kind torchao --kind quanto
    python benchmarks/diffusers_behaviours.py --behaviour dora     # these cells anew

The behaviours stand in `tests/behaviours`, whose test holds stepquant to the table. They run on
tiny random models. Cells that are not asked for stay as the file has them.

The peers are torchao's int8 weight-only and optimum-quanto's int8, through diffusers' own configs.
stepquant does not depend on them; `pip install torchao optimum-quanto` brings them. peft is needed
for LoRAs. The whole table takes an hour of one core, most of it compilation.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "diffusers_behaviours.json"
PACKAGES = ("diffusers", "torch", "accelerate", "peft", "transformers")
PEERS = {"torchao": "torchao", "quanto": "optimum-quanto"}

sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "behaviours")]


def read() -> dict[str, Any]:
    """The table so far."""
    if RESULTS.exists():
        return json.loads(RESULTS.read_text(encoding="utf-8"))
    return {"versions": {}, "outcomes": {}}


def write(table: dict[str, Any]) -> None:
    """Write the table in a fixed order."""
    text = json.dumps(table, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


def versions(packages: list[str]) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Run cells and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", action="append", help="may be repeated; default: no peer")
    parser.add_argument("--behaviour", action="append", help="may be repeated; default: all")
    parser.add_argument("--model", action="append", help="may be repeated; default: all")
    parser.add_argument("--not-slow", action="store_true", help="leave compilation out")
    parser.add_argument("--new", action="store_true", help="only cells that the file lacks")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)

    import torch

    from all_behaviours import BEHAVIOURS
    from behaviour import outcome
    from behaviour_subjects import FLOAT, MODELS, OWN
    from behaviour_table import cells, compact

    torch.set_num_threads(1)
    table = read()
    kinds = given.kind or [FLOAT, *OWN]
    for name in given.behaviour or BEHAVIOURS:
        row = table["outcomes"].setdefault(name, {})
        if given.not_slow and BEHAVIOURS[name].slow:
            continue
        for kind in kinds:
            found = cells(row.get(kind, {}))
            for model in given.model or MODELS:
                if not (given.new and model in found):
                    found[model] = outcome(name, kind, model)
                    print(f"{name}, {kind}, {model}: {found[model]}", flush=True)
            row[kind] = compact(found)
        write(table)
    rows = table["outcomes"]
    table["outcomes"] = {name: rows[name] for name in BEHAVIOURS if name in rows}
    table["behaviours"] = [
        [each.group, each.name, each.description] for each in BEHAVIOURS.values()
    ]
    table["versions"] |= versions([*PACKAGES, *(PEERS[kind] for kind in kinds if kind in PEERS)])
    write(table)
    sys.stdout.flush()
    os._exit(0)  # without the destructors of threads that a peer has left running


if __name__ == "__main__":
    main()
