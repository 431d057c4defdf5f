"""A behaviour that users of diffusers rely on, and how a model's run of it ends."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from behaviour_subjects import FLOAT, Subject
from stepquant.support.errors import StepQuantError

Run = Callable[[Subject], None]
BEHAVIOURS: dict[str, Behaviour] = {}
WORKS = "works"
REFUSED = "refused"
FAILS = "fails"
NOT_APPLICABLE = "not applicable"
# Sentences in which diffusers itself refuses a quantized model of any kind.
DIFFUSERS_REFUSES = ("Casting a quantized model to a new `dtype` is unsupported",)
TRANSFORMERS = ("dit", "pixart", "sd3", "flux")


class NotApplicable(Exception):
    """The behaviour is none of the model's, for the reason that the message gives."""


@dataclass(frozen=True)
class Behaviour:
    """A behaviour, checked by `run`, which raises where the model does not have it."""

    run: Run
    group: str
    slow: bool
    control: bool
    """Whether a quantized model is asked for nothing that the float model does not have."""

    @property
    def name(self) -> str:
        """The function's name in words."""
        return self.run.__name__.replace("_", " ")

    @property
    def description(self) -> str:
        """The first line of the function's docstring."""
        return inspect.getdoc(self.run).partition("\n")[0]  # type: ignore[union-attr]


def behaviour(group: str, slow: bool = False, control: bool = True) -> Callable[[Run], Run]:
    """Decorator that adds a function to `BEHAVIOURS`."""

    def add(run: Run) -> Run:
        found = Behaviour(run, group, slow, control)
        BEHAVIOURS[found.name] = found
        return run

    return add


def need(condition: object, reason: str) -> None:
    """Raise `NotApplicable` with `reason` where `condition` does not hold."""
    if not condition:
        raise NotApplicable(reason)


def outcome(name: str, kind: str, model: str, control: str | None = None) -> str:
    """How the behaviour `name` ends for a `kind` of the model: a word of the four, and a reason.

    `control` is the float model's outcome where it is known. Where the float model does not have
    the behaviour, no quantized one is asked for it.
    """
    if kind != FLOAT and BEHAVIOURS[name].control:
        control = control or float_outcome(name, model)
        if first_word(control) == FAILS:
            return f"{NOT_APPLICABLE}: the float model {control}"
        if control != WORKS:
            return control
    return _run(name, kind, model)


@cache
def float_outcome(name: str, model: str) -> str:
    """How the behaviour ends for the float model."""
    return _run(name, FLOAT, model)


def _run(name: str, kind: str, model: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                BEHAVIOURS[name].run(Subject(kind, model, Path(folder)))
        except NotApplicable as reason:
            return f"{NOT_APPLICABLE}: {reason}"
        except Exception as error:
            refusal = refused(error)
            if refusal is not None:
                return f"{REFUSED}: {refusal}".replace(folder, "FOLDER")
            first = str(error).strip().partition("\n")[0][:200]
            return f"{FAILS}: {type(error).__name__}: {first}".replace(folder, "FOLDER")
    return WORKS


def refused(error: BaseException) -> str | None:
    """The sentence in which stepquant, or diffusers for all quantizers, refuses, or None."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, StepQuantError) or str(found).startswith(DIFFUSERS_REFUSES):
            return str(found)
        found = found.__cause__
    return None


def first_word(text: str) -> str:
    """Which of the four outcomes `text` is."""
    return text.partition(":")[0]
