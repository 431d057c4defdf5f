"""One attack after another on a subject: each ends with the sound value or with one sentence."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mutations import mutate
from subjects import Subject

from stepquant.support.errors import LONGEST, StepQuantError

SECONDS = 30  # that one case may take
MEMORY = 1 << 20  # KiB that the peak may grow by in one case


class Hang(BaseException):
    """A case takes too long; no handler of errors catches it."""


def attack(
    subject: Subject, folder: Path, seed: int, cases: range
) -> tuple[Counter[str], list[str]]:
    """Run `cases` on `subject` in the new `folder`; return outcomes by kind, and faults."""
    folder.mkdir(parents=True)
    sound = folder / "sound"
    subject.write(sound)
    shutil.copytree(sound, folder / "copy")
    known = subject.use(folder / "copy", folder / "known")
    outcomes: Counter[str] = Counter()
    faults = []
    for number in cases:
        case = folder / f"case-{number}"
        shutil.copytree(sound, case / "files")
        draw = random.Random(f"{seed}/{subject.name}/{number}")
        done = mutate(case / "files", subject.changed(sound), draw)
        outcome = one(subject, case, known)
        outcomes[outcome.partition(":")[0]] += 1
        if outcome.startswith("fault"):
            faults.append(f"{subject.name} {number} ({done}): {outcome}")
        shutil.rmtree(case, ignore_errors=True)
    return outcomes, faults


def one(subject: Subject, case: Path, known: Any) -> str:
    """The outcome of one case: "same", "other", "refused" or "fault: ..."."""
    before = peak()
    try:
        with limited(SECONDS):
            found = subject.use(case / "files", case / "out")
    except StepQuantError as error:
        sentence = str(error)
        if not sentence.isprintable() or len(sentence) > LONGEST + 100 or len(sentence) < 20:
            return f"fault: no sentence: {sentence[:300]!a}"
        outcome = "refused"
    except Hang:
        return f"fault: more than {SECONDS} s"
    except Exception:
        return f"fault: {traceback.format_exc()}"
    else:
        outcome = "same" if found == known else "other"
        if outcome == "other" and subject.exact:
            return "fault: another value, without a word"
    grown = peak() - before
    return f"fault: {grown >> 10} MiB" if grown > MEMORY else outcome


def peak() -> int:
    """Memory that the process has taken at most, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` after so long."""

    def late(*_: Any) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
