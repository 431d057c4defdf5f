"""`make fuzz`: attacks on everything that stepquant reads. Bounded, and the same for each seed.

    python tests/fuzz [--seed N] [--subject NAME] [--first N] [--cases N] [--times X]

One line for each subject, and its faults, each with what reproduces it. The exit code is 1 if
there are any.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from attack import attack  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from subjects import SUBJECTS  # noqa: E402


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subject", choices=[subject.name for subject in SUBJECTS])
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, help="of each subject; its own number otherwise")
    parser.add_argument("--times", type=float, default=1.0, help="so many times its own number")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    for library in (diffusers_logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    faults = []
    for subject in SUBJECTS:
        if options.subject not in (None, subject.name):
            continue
        count = options.cases or round(subject.cases * options.times)
        cases = range(options.first, options.first + count)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes, found = attack(subject, Path(folder) / "fuzz", options.seed, cases)
        text = ", ".join(f"{number} {kind}" for kind, number in sorted(outcomes.items()))
        print(f"{subject.name}: {text}; {time.monotonic() - started:.0f} s", flush=True)
        for fault in found:
            number = fault.split()[1]
            print(f"\n{fault}\n  python tests/fuzz --seed {options.seed}", end=" ")
            print(f"--subject {subject.name} --first {number} --cases 1\n", flush=True)
        faults += found
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
