"""A packed denoiser on a machine that lacks something, beside the reference kernel.

`python degraded.py NAME=VALUE ...` forks a child for each argument, which sets that variable before
oneDNN and the native library read theirs, and prints what it found, one line of JSON for each.
"""

from __future__ import annotations

import copy
import json
import os
import sys

import torch
from fast_models import TABLES, packed, predictor

from stepquant.bench import set_backend
from stepquant.runtime import native
from stepquant.runtime.kernels import cpu
from stepquant.runtime.notes import slow_paths

BATCHES = (1, 3, 2)
DTYPES = (torch.float32, torch.bfloat16)


def check(setting: str) -> None:
    """Print the largest differences to the reference kernel and to one thread, and the notes."""
    name, _, value = setting.partition("=")
    os.environ[name] = value
    record = {"setting": setting, "errors": {}, "threads": {}}
    for bits in (8, 4):
        auto = packed("sd", TABLES, bits)
        for dtype in DTYPES:
            torch.nn.Module.to(auto, dtype)
            reference = copy.deepcopy(auto)
            set_backend(reference, "reference")
            key = f"w{bits}a{bits} {dtype}".replace("torch.", "")
            errors, threads = [], []
            for batch in BATCHES:
                predict = predictor(auto, batch, dtype)
                expected = predict(reference).float()
                torch.set_num_threads(2)
                double = predict(auto).float()
                torch.set_num_threads(1)
                found = predict(auto).float()
                errors.append(float((found - expected).norm() / expected.norm()))
                threads.append(float((found - double).norm() / expected.norm()))
            record["errors"][key], record["threads"][key] = errors, threads
    record["notes"] = slow_paths(auto)
    record["pairs_saturate"], record["native"] = cpu.pairs_saturate(), native.available()
    print(json.dumps(record), flush=True)


def main() -> None:
    """Check each setting in a child of its own, one after another."""
    torch.set_num_threads(1)
    for setting in sys.argv[1:]:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                check(setting)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"{setting}: failed")


if __name__ == "__main__":
    main()
