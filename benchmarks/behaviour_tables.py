"""The tables of `docs/reference/diffusers.md`: outcomes of `diffusers_behaviours.py`."""

from __future__ import annotations

import re

from table_registry import markdown, read, table

KINDS = {
    "w8": "`WeightOnlyConfig()`",
    "w4": "`WeightOnlyConfig(bits=4)`",
    "dynamic": "`DynamicConfig()`",
    "W8A8": "calibrated W8A8",
    "W4A4": "calibrated W4A4",
    "torchao": "torchao int8",
    "quanto": "quanto int8",
}
PEERS = ("torchao", "quanto")


def outcome_counts(entry: dict[str, list[str]]) -> str:
    """What came of a row's models: a word if all agree, else numbers of models."""
    numbers: dict[str, int] = {}
    for text, models in entry.items():
        word = text.partition(":")[0]
        if word != "not applicable":
            numbers[word] = numbers.get(word, 0) + len(models)
    if len(numbers) < 2:
        return next(iter(numbers), "")
    return ", ".join(f"{word} on {numbers[word]}" for word in sorted(numbers, reverse=True))


def behaviours_of(group: str) -> str:
    """A row for each behaviour of a group, a column for each kind of quantized model."""
    values = read("diffusers_behaviours.json")
    rows = []
    for of, name, description in values["behaviours"]:
        row = values["outcomes"][name]
        if of == group:
            cells = [outcome_counts(row.get(kind, {})) for kind in KINDS]
            rows.append([f"*{name}*: {description}", *cells])
    return markdown([group, *KINDS.values()], rows)


@table
def behaviours_save() -> str:
    """Saving and loading."""
    return behaviours_of("Save and load")


@table
def behaviours_memory() -> str:
    """Offloading."""
    return behaviours_of("Memory")


@table
def behaviours_calls() -> str:
    """Calls of the denoiser."""
    return behaviours_of("Calls")


@table
def behaviours_lora() -> str:
    """LoRAs by diffusers' own calls."""
    return behaviours_of("LoRA")


@table
def behaviours_pipelines() -> str:
    """Pipelines."""
    return behaviours_of("Pipelines")


def without_names(reason: str) -> str:
    """The reason as it is for every layer and every model."""
    reason = re.sub(r"(layer|such as) '[^']+'", r"\1 'NAME'", reason)
    reason = re.sub(r"on a \w+ with", "on a MODEL with", reason)
    return reason.replace("|", "\\|")


def behaviours_that(outcome: str) -> str:
    """The reasons of an outcome, a row for each behaviour and reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, row in read("diffusers_behaviours.json")["outcomes"].items():
        for kind in KINDS:
            for text in row.get(kind, {}) if kind not in PEERS else ():
                word, _, reason = text.partition(": ")
                if word == outcome:
                    general = without_names(reason)
                    rows.setdefault((name, general), []).append(KINDS[kind])
    lines = ["| Behaviour | Kinds | Reason |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {', '.join(dict.fromkeys(kinds))} | {reason} |"
        for (name, reason), kinds in sorted(rows.items())
    ]
    return "\n".join(lines) + "\n" if rows else "None.\n"


@table
def behaviours_refused() -> str:
    """Refusals of stepquant, each with its sentence."""
    return behaviours_that("refused")


@table
def behaviours_failing() -> str:
    """Failures of stepquant, each with its error."""
    return behaviours_that("fails")


@table
def behaviours_versions() -> str:
    """Packages with which the behaviours were tried."""
    found = read("diffusers_behaviours.json")["versions"]
    return ", ".join(f"{name} {found[name]}" for name in sorted(found)) + ".\n"
