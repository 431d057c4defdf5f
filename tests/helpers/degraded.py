"""A packed denoiser on a machine that lacks something, beside the reference kernel.

`python degraded.py FOLDER NAME=VALUE ...` forks a child for each setting, which sets that variable
before oneDNN and the native library read theirs, runs the models `FOLDER/BITS.pickle`, and prints
what it found, one line of JSON for each.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from fast_models import predictor
from stepquant.engines.backend import set_backend
from stepquant.engines.slow_paths import slow_paths
from stepquant.runtime.kernels import onednn
from stepquant.runtime.ops import native

BATCHES = (1, 3, 2)  # in turn on one model
BITS = (8, 4)


def check(folder: Path, setting: str) -> None:
    """Print distances to the reference kernel, to two threads and to float32, and the notes."""
    name, _, value = setting.partition("=")
    os.environ[name] = value
    record = {"setting": setting, "errors": {}, "threads": {}, "bfloat16": {}}
    for bits in BITS:
        # Quantized elsewhere: oneDNN must not have been asked for anything yet.
        auto = pickle.loads(Path(folder, f"{bits}.pickle").read_bytes())
        reference = copy.deepcopy(auto)
        set_backend(reference, "reference")
        exact = {batch: predictor(auto, batch)(reference) for batch in BATCHES}
        record["errors"][bits] = [distance(run(auto, b), exact[b]) for b in BATCHES]
        record["threads"][bits] = [distance(run(auto, b, threads=2), exact[b]) for b in BATCHES]
        for model in (auto, reference):
            nn.Module.to(model, torch.bfloat16)
        record["bfloat16"][bits] = [
            (distance(run(auto, b), exact[b]), distance(run(reference, b), exact[b]))
            for b in BATCHES
        ]
        record["notes"] = slow_paths(auto)
    record["pairs_saturate"], record["native"] = onednn.pairs_saturate(), native.available()
    print(json.dumps(record), flush=True)


def run(model: nn.Module, batch: int, threads: int = 1) -> Tensor:
    torch.set_num_threads(threads)
    y = predictor(model, batch, model.dtype)(model)
    torch.set_num_threads(1)
    return y.float()


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    """Check each setting in a child of its own, one after another."""
    torch.set_num_threads(1)
    folder, *settings = sys.argv[1:]
    for setting in settings:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                check(Path(folder), setting)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"{setting}: failed")


if __name__ == "__main__":
    main()
