"""Fills the tables of the documentation in from `benchmarks/results`.

    python benchmarks/doc_tables.py            # rewrite the pages
    python benchmarks/doc_tables.py --check    # list the pages that are out of date

A page says where a table goes: whatever stands between `<!-- table: NAME -->` and
`<!-- end of table -->` is replaced by the table that `TABLES[NAME]` makes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)
# A number and its unit stay on one line.
UNIT = re.compile(r"(?<=\d) (?=(?:dB|ms|s|MB|GiB|B|%)\b|%)")
NARROW = "\N{NO-BREAK SPACE}"

Record = dict[str, Any]
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Register a table under its function's name, with dashes."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function


def read(name: str) -> Any:
    """One file of results; a list of records for `.jsonl`."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |"]
    lines.append("| " + " | ".join(["---", *["--:"] * (len(head) - 1)]) + " |")
    lines += ["| " + " | ".join(UNIT.sub(NARROW, cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# Image quality: cells of `quality.py` and of the ablations.


def is_float(cell: Record) -> bool:
    """Whether the cell is the float model's."""
    return cell["recipe"] is None


def label(cell: Record) -> str:
    """What the run was called, else its recipe."""
    if is_float(cell):
        return "float32"
    return str(cell["extra"].get("label") or cell["recipe"]["name"])


def bits(cell: Record) -> str:
    """The width, and the mean of the weights' bits where a recipe raises it."""
    if is_float(cell):
        return ""
    text = cell["quantize"]["bits"].upper()
    mean, nominal = cell["quantize"]["mean_weight_bits"], cell["recipe"]["scheme"]["weight_bits"]
    return f"{text}, mean {mean:.1f}" if mean - nominal > 0.05 else text


def distance(cell: Record) -> str:
    """`fd_fashion` to the training data with its interval."""
    quality = cell["quality"]
    low, high = quality["fd_fashion_interval"]
    return f"{quality['fd_fashion']:.2f} ({low:.2f} to {high:.2f})"


def ratio(cell: Record) -> str:
    """`fd_fashion` over the float model's."""
    return f"{cell['quality']['fd_fashion_ratio']:.2f}"


def psnr(cell: Record) -> str:
    """PSNR to the float model's images from the same noise."""
    return "" if is_float(cell) else f"{cell['quality']['paired_psnr_db']:.1f} dB"


def smaller(cell: Record) -> str:
    """Float32 bytes over the checkpoint's."""
    return "1" if is_float(cell) else f"{cell['quantize']['times_smaller']:.2f}"


def seconds(cell: Record) -> str:
    """How long quantizing took."""
    return "" if is_float(cell) else f"{cell['quantize']['seconds']:.0f} s"


def quality_table(file: str, names: dict[str, str] | None = None) -> str:
    """A row for each cell of a file; labels in the words of `names` where it has any."""
    rows = []
    for cell in read(file):
        found = label(cell)
        name = (names or {}).get(found) or (found if is_float(cell) else f"`{found}`")
        values = [make(cell) for make in (bits, distance, ratio, psnr, smaller, seconds)]
        rows.append([name, *values])
    head = ["Model", "Bits", "fd_fashion (95 %)", "Ratio to float", "PSNR", "Times smaller"]
    return markdown([*head, "Quantized in"], rows)


@table
def quality() -> str:
    """`quality.py` with its defaults."""
    return quality_table("quality.jsonl")


@table
def quality_tcaq_dm() -> str:
    """TCAQ-DM beside its baseline and DilateQuant."""
    return quality_table("quality_tcaq_dm.jsonl", {"tcaq-dm, own start": "`tcaq-dm`, own start"})


@table
def quality_stepquant() -> str:
    """Our recipe beside the papers'."""
    names = {
        "stepquant without its bypass": "`stepquant`, no bypass",
        "mpq-dm, 32 rounds": "`mpq-dm`, 32 rounds",
    }
    return quality_table("quality_stepquant.jsonl", names)


@table
def quality_low_bits() -> str:
    """Two bits of weights."""
    return quality_table("quality_low_bits.jsonl")


@table
def quality_low_bits_short() -> str:
    """Two and three bits of weights, trained for less time."""
    names = {
        "efficientdm, common start": "`efficientdm`, common start",
        "mpq-dm, common start": "`mpq-dm`, common start",
    }
    return quality_table("quality_low_bits_short.jsonl", names)


WIDTHS = ("w4a8", "w4a4", "w2a4")
PAPERS = ("q-diffusion", "dilatequant", "tcaq-dm", "mpq-dm")


def summary_cells() -> dict[tuple[str, str], Record]:
    """`(recipe, width)` -> cell of 512 images, as measured with like settings."""
    cells: dict[tuple[str, str], Record] = {}
    for cell in read("quality_stepquant.jsonl") + read("quality_tcaq_dm.jsonl"):
        if not is_float(cell):
            cells.setdefault((label(cell), cell["quantize"]["bits"]), cell)
    return cells


@table
def quality_summary() -> str:
    """The floor, the best published method and our recipe at each width."""
    cells = summary_cells()

    def text(cell: Record | None, name: bool = False) -> str:
        if cell is None:
            return ""
        start = f"`{label(cell)}` " if name else ""
        return f"{start}{cell['quality']['fd_fashion']:.2f}, {psnr(cell)}"

    best = {
        width: min(
            (cells[name, width] for name in PAPERS if (name, width) in cells),
            key=lambda cell: cell["quality"]["fd_fashion"],
        )
        for width in WIDTHS
    }
    rows = [
        ["`minmax`: ranges only", *[text(cells.get(("minmax", width))) for width in WIDTHS]],
        ["best published method", *[text(best[width], name=True) for width in WIDTHS]],
        ["`stepquant`: ours, the default", *[text(cells["stepquant", width]) for width in WIDTHS]],
        ["times smaller than float32", *[smaller(cells["stepquant", width]) for width in WIDTHS]],
    ]
    return markdown(["", *[width.upper() for width in WIDTHS]], rows)


@table
def conditional() -> str:
    """Models with prompts and labels."""
    rows = []
    for cell in read("conditional.jsonl"):
        quality = cell["quality"]
        right = f"{100 * quality['top1']:.1f} %"
        if is_float(cell):
            model = cell["model"].removeprefix("builtin:")
            rows.append([f"`{model}`, float32", "", "", "", right, "1", ""])
            continue
        to_float = f"{quality['fd_fashion_to_float']:.2f}"
        values = [bits(cell), to_float, psnr(cell), right, smaller(cell), seconds(cell)]
        rows.append([f"`{label(cell)}`", *values])
    head = ["Model", "Bits", "fd_fashion to float's images", "PSNR", "Right class"]
    return markdown([*head, "Times smaller", "Quantized in"], rows)


@table
def sampler_swap() -> str:
    """A recipe calibrated for one sampler, sampled with another."""
    cells = [cell for cell in read("sampler_swap.jsonl") if not is_float(cell)]
    names = {"dpm-solver++": "DPM-Solver++", "ddim": "DDIM"}

    def matched(cell: Record) -> Record:
        """The same recipe, calibrated for the sampler that `cell` is sampled with."""
        return next(
            other
            for other in cells
            if other["recipe"]["name"] == cell["recipe"]["name"]
            and other["extra"]["sampled"] == other["extra"]["calibrated"]
            and other["extra"]["sampled"] == cell["extra"]["sampled"]
        )

    rows = []
    for cell in cells:
        sampled = cell["extra"]["sampled"]
        if cell["extra"]["calibrated"] == sampled:
            continue
        name, steps = sampled.split(":")
        values = [f"{ratio(one)}, {psnr(one)}" for one in (cell, matched(cell))]
        rows.append([f"{names[name]}, {steps} steps", f"`{label(cell)}`", *values])
    head = ["Sampled with", "Recipe", "Calibrated for 100 DDIM steps"]
    return markdown([*head, "Calibrated for this sampler"], rows)


# Ablations.


def parts_table(file: str) -> str:
    """Label, distance, distance over the float model's, PSNR."""
    rows = [
        [label(cell).replace("1 rounds", "1 round"), distance(cell), ratio(cell), psnr(cell)]
        for cell in read(file)
    ]
    return markdown(["Row", "fd_fashion (95 %)", "Ratio to float", "PSNR"], rows)


@table
def dilatequant_parts() -> str:
    """Every combination of Weight Dilation, TPQ and BKD."""
    rows = []
    for cell in read("ablation.jsonl"):
        if is_float(cell):
            continue
        parts = label(cell).removeprefix("none (MSE ranges)").split(" + ")
        scaling = next((part for part in parts if part == "WD" or "Smooth" in part), "none")
        has = ["yes" if part in parts else "" for part in ("TPQ", "BKD")]
        rows.append([scaling, *has, ratio(cell), psnr(cell)])
    return markdown(["Scaling", "TPQ", "BKD", "Ratio to float", "PSNR"], rows)


@table
def tcaq_dm_parts() -> str:
    """TCAQ-DM's parts and open choices."""
    return parts_table("tcaq_dm_ablation.jsonl")


@table
def tcaq_dm_summary() -> str:
    """The same parts at two widths side by side."""
    cells = {label(cell): cell for cell in read("tcaq_dm_ablation.jsonl")}
    names = [
        "reconstruction",
        "+ TCR",
        "+ DAQ",
        "+ PAR",
        "+ TCR + DAQ + PAR",
        "reconstruction, corrected",
        "+ TCR + DAQ + PAR, corrected",
    ]
    rows = []
    for name in names:
        found = [cells[f"{width} {name}"] for width in ("W6A6", "W4A4")]
        rows.append([name, *[f"{ratio(cell)}, {psnr(cell)}" for cell in found]])
    return markdown(["Ratio to float, PSNR", "W6A6", "W4A4"], rows)


@table
def bias_correction() -> str:
    """The mean error taken off each step's prediction."""
    return parts_table("bias_correction.jsonl")


# Label in the records -> (input bypass, block training, biases and norms).
STEPQUANT_PARTS = {
    "W4A4 blocks only, one step, without bypass": ("no", "single steps", "no"),
    "W4A4 blocks only, without bypass": ("no", "8 steps together", "no"),
    "W4A4 blocks by one step, without bypass": ("no", "single steps", "yes"),
    "W4A4 biases and norms only, without bypass": ("no", "none", "yes"),
    "W4A4 without bypass": ("no", "8 steps together", "yes"),
    "W4A4 blocks only": ("yes", "8 steps together", "no"),
    "W4A4 stepquant": ("yes", "8 steps together", "yes"),
    "W4A4 rounding": ("yes", "8 steps together; learned rounding", "yes"),
    "W4A4 + TPQ": ("yes", "8 steps together; a scale per step", "yes"),
    "W4A4 + bias correction": ("yes", "8 steps together; bias correction last", "yes"),
    "W4A4 + smoothing": ("yes", "8 steps together; SmoothQuant(0.5) first", "yes"),
    "W4A4 + WD": ("yes", "8 steps together; Weight Dilation first", "yes"),
    "W4A4 4 together": ("yes", "4 steps together, both stages", "yes"),
    "W4A4 16 together": ("yes", "16 steps together, both stages", "yes"),
    "W2A4 without bypass": ("no", "8 steps together", "yes"),
    "W2A4 blocks only": ("yes", "8 steps together", "no"),
    "W2A4 biases and norms only": ("yes", "none", "yes"),
    "W2A4 stepquant": ("yes", "8 steps together", "yes"),
    "W8A8 without bypass": ("no", "8 steps together", "yes"),
    "W8A8 stepquant": ("yes", "8 steps together", "yes"),
    "W8A8 bypass and bias correction": ("yes", "none; bias correction", "no"),
}
RECIPES_AMONG_THEM = {
    "W8A8 bypass and bias correction": "`training-free`",
    **{f"{width} stepquant": "`stepquant`" for width in ("W2A4", "W4A4", "W8A8")},
}


@table
def stepquant_parts() -> str:
    """Our recipe's parts, and what else was tried with them."""
    cells = {label(cell): cell for cell in read("stepquant_ablation.jsonl") if not is_float(cell)}
    if cells.keys() != STEPQUANT_PARTS.keys():
        unknown = sorted(cells.keys() ^ STEPQUANT_PARTS.keys())
        raise SystemExit(f"stepquant_ablation.jsonl and STEPQUANT_PARTS differ in {unknown}")
    rows = []
    for name, parts in STEPQUANT_PARTS.items():
        recipe = RECIPES_AMONG_THEM.get(name)
        width = name.split()[0] + (f", {recipe}" if recipe else "")
        rows.append([width, *parts, ratio(cells[name]), psnr(cells[name])])
    head = ["Bits", "Input bypass", "Block training", "Biases and norms", "Ratio to float", "PSNR"]
    return markdown(head, rows)


# Label in the records, where OMQ includes smoothing unless it says "without", -> words.
MIXED_BITS = {
    "float32": "float32",
    "base": "base (`efficientdm`)",
    "base in the sampler's order": "base, steps in the sampler's order",
    "base + smoothing": "base + smoothing",
    "base + OMQ": "base + smoothing + OMQ",
    "base + OMQ without smoothing": "base + OMQ",
    "base + TRD": "base + TRD",
    "base + TRD's windows alone": "base + TRD's windows without its term",
    "base + OMQ without smoothing + TRD": "base + OMQ + TRD",
    "OMQ by error without smoothing + TRD": "base + OMQ by error + TRD",
    "base + OMQ + TRD": "base + smoothing + OMQ + TRD (`mpq-dm`)",
    "OMQ by magnitude + TRD": "`mpq-dm`, OMQ by magnitude",
    "OMQ by random + TRD": "`mpq-dm`, OMQ at random",
    "OMQ by error + TRD": "`mpq-dm`, OMQ by error",
    "base + OMQ + L2 of features": "`mpq-dm`, L2 of features instead of relations",
    "base + OMQ + TRD's windows alone": "`mpq-dm`, TRD's windows without its term",
}


@table
def mixed_bits() -> str:
    """MPQ-DM's parts; several numbers in a cell are several seeds."""
    cells = read("mixed_bits.jsonl")
    rows = []
    for name, words in MIXED_BITS.items():
        found = [cell for cell in cells if label(cell) == name]
        numbers = ", ".join(f"{cell['quality']['fd_fashion']:.2f}" for cell in found)
        levels = ", ".join(psnr(cell).removesuffix(" dB") for cell in found)
        rows.append([words, numbers, "" if name == "float32" else f"{levels} dB"])
    return markdown(["Steps", "fd_fashion", "PSNR"], rows)


@table
def input_bypass() -> str:
    """What rounding the sampler's sample costs."""
    words = {
        "input layer alone": "the first layer's input alone",
        "ranges": "all layers, ranges only",
        "ranges and bias_correction": "all layers, and `bias_correction`",
    }
    rows = []
    for row in read("input_bypass.jsonl"):
        alone = row["what"] == "input layer alone"
        rows.append(
            [
                words[row["what"]],
                "A8" if alone else row["bits"].upper(),
                "yes" if row["bypass"] else "no",
                f"{row['runaways']} of {row['num']}",
                f"{row['paired_psnr_db']:.1f} dB",
                f"{row['fd_fashion_to_float']:.2f}",
            ]
        )
    head = ["Quantized", "Bits", "Bypass", "Runs away", "PSNR", "fd_fashion to float's images"]
    return markdown(head, rows)


@table
def exposure_drift() -> str:
    """How far inputs drift from those that blocks were calibrated on."""
    means = read("exposure_drift.json")["mean"]
    names = ["trained on the float model's trajectories"]
    names += [f"+ {n} round{'s' if n > 1 else ''} on its own" for n in range(1, len(means))]
    rows = [[name, f"{mean:.3f}"] for name, mean in zip(names, means, strict=True)]
    return markdown(["Blocks", "Relative squared difference of inputs, mean"], rows)


@table
def temporal_training() -> str:
    """Batches over all steps beside one step after another."""
    rows = [
        [
            "all steps mixed" if arm["order"] == "mixed" else "one step after another",
            str(arm["samples_drawn_per_block"]),
            f"{arm['seconds']:.0f} s",
            f"{arm['mean_final_loss']:.4f}",
        ]
        for arm in read("temporal_training.json")["arms"]
    ]
    return markdown(["Batches", "Samples per block", "Time", "Mean held-out loss"], rows)


@table
def sampler_sensitivity() -> str:
    """White noise on the float model's predictions, with and without clipping."""
    rows = [
        [
            "yes" if row["clip_sample"] else "no",
            f"{row['relative_noise']:g}",
            f"{row['paired_psnr_db']:.1f} dB",
            f"{row['fd_fashion_to_float']:.2f}",
        ]
        for row in read("sampler_sensitivity.json")["rows"]
    ]
    head = ["`clip_sample`", "Noise power over prediction power", "PSNR"]
    return markdown([*head, "fd_fashion to float's images"], rows)


@table
def fidelity() -> str:
    """The packed model beside its simulation."""
    rows = []
    for row in read("fidelity.json")["rows"]:
        spread = row["psnr_difference_standard_error_db"]
        rows.append(
            [
                row["bits"].upper(),
                f"{row['worst_relative_difference']:.1e}",
                f"{row['psnr_packed_db']:.2f} dB",
                f"{row['psnr_simulated_db']:.2f} dB",
                f"{row['psnr_difference_db']:.2f} ± {spread:.2f} dB",
                "yes" if row["reference_kernels_bit_equal_to_simulation"] else "no",
                "yes" if row["reload_bit_equal"] else "no",
            ]
        )
    head = ["Bits", "Worst layer difference", "PSNR packed", "PSNR simulated", "Difference"]
    return markdown([*head, "Reference kernels bit-equal", "Reload bit-equal"], rows)


@table
def backend_quality() -> str:
    """Images of one checkpoint on every backend of the CPU."""
    names = {
        "onednn": "layer by layer on oneDNN",
        "auto": "our kernels, fused blocks",
        "openvino": "OpenVINO",
        "reference": "reference kernels",
    }
    rows = []
    for row in read("backend_quality.json")["rows"]:
        level = f"{row['paired_psnr_db']:.1f} dB"
        rows.append([row["bits"].upper(), names[row["backend"]], str(row["num"]), level])
    return markdown(["Bits", "Backend", "Images", "PSNR"], rows)


@table
def operator_overhead() -> str:
    """Fused passes called directly and as operators, on the smaller of two images."""
    found = read("operator_overhead.json")["passes"]
    rows = [
        [each["name"], f"{each['direct_us']:.0f}", f"{each['operator_us']:.0f}"]
        for each in found[: len(found) // 2]
    ]
    return markdown(["Pass, channels x height x width", "Direct (µs)", "Operator (µs)"], rows)


@table
def operator_overhead_in_models() -> str:
    """Denoiser calls with all passes called directly, and as operators."""
    rows = []
    for each in read("operator_overhead.json")["models"]:
        times = [f"{each[key]:.1f} ms" for key in ("direct_ms", "operator_ms")]
        more = f"{each['overhead_percent']:.0f} %"
        rows.append([each["model"], str(sum(each["passes"].values())), *times, more])
    return markdown(["Model, W4A8", "Passes", "Direct", "Operators", "Longer by"], rows)


WAYS = {
    "call by call": "call by call",
    "kept memory": "call by call, the allocator keeps its memory",
    "compiled": "`torch.compile`",
    "exported": "`torch.export` and AOTInductor",
    "captured": "captured call",
}


@table
def captured_calls() -> str:
    """Five ways to call a packed denoiser."""
    rows = []
    for each in read("captured_calls.json")["rows"]:
        model = {"paper": "35.7 M DDPM", "embedded": "`builtin:fashion-ddpm`"}[each["model"]]
        cells = [f"{model}, batch {each['batch']}", WAYS[each["way"]]]
        if "error" in each:
            rows.append([*cells, "-", "-", "-"])
            continue
        equal = "yes" if each["largest_difference"] == 0 else f"{each['largest_difference']:.0e}"
        setup = f"{each['setup_seconds']:.1f} s"
        rows.append([*cells, f"{each['milliseconds']:.1f} ms", setup, equal])
    head = ["Model, W8A8", "Way", "A call", "Until it is ready", "Same bits"]
    return markdown(head, rows)


@table
def feature_sensitivity() -> str:
    """What the feature distance sees."""
    found = read("feature_sensitivity.json")["distances"]
    rows = [[name, f"{value:.2f}"] for name, value in found.items()]
    return markdown(["Change to the test images", "fd_fashion to the training set"], rows)


@table
def residual_branch() -> str:
    """One bit more in the grid beside a binary residual branch."""
    rows = []
    for width, errors in read("residual_branch.json")["relative_error"].items():
        for part in ("all channels", "salient tenth"):
            grid, branch = errors[f"finer grid, {part}"], errors[f"residual branch, {part}"]
            gain = f"{100 * (1 - branch / grid):.1f} %"
            rows.append([f"{width}, {part}", f"{grid:.4f}", f"{branch:.4f}", gain])
    head = ["Relative error of the weights", "Finer grid", "Residual branch"]
    return markdown([*head, "The branch is lower by"], rows)


# Speed, size, memory.

ENGINES = {
    "best bf16": "torch bf16, eager or compiled",
    "float32": "torch float32, eager",
    "bf16": "torch bf16, eager",
    "bf16 compiled": "torch bf16, `torch.compile`",
    "openvino float32": "OpenVINO float32",
    "openvino bf16": "OpenVINO bf16",
    "openvino nncf int8": "OpenVINO + NNCF INT8",
    "openvino nncf int8 bf16": "OpenVINO + NNCF INT8, bf16 between",
    "stepquant w8a8": "stepquant W8A8",
    "stepquant w4a4": "stepquant W4A4",
    "stepquant w8a8 call by call": "stepquant W8A8, calls not recorded",
    "stepquant w8a8 by layer": "stepquant W8A8, layer by layer on oneDNN",
    "stepquant w8a8 openvino": "stepquant W8A8 on OpenVINO",
    "stepquant w8a8 openvino bf16": "stepquant W8A8 on OpenVINO, bf16 between",
}
MODELS = {
    "embedded": "DDPM, 1.8 M",
    "paper": "DDPM, 35.7 M",
    "sd15": "SD 1.5 UNet",
    "dit-xl": "DiT-XL/2",
}
# The README's columns: among them two where the rival wins.
HEADLINE = (("embedded", 1), ("paper", 1), ("paper", 16), ("sd15", 2), ("dit-xl", 2))
HEADLINE_ENGINES = (
    "best bf16",
    "openvino nncf int8",
    "openvino nncf int8 bf16",
    "stepquant w8a8",
    "stepquant w4a4",
)


def timing(model: str, batch: int) -> dict[str, Record]:
    """Engine -> row of one cell of `cpu_runtime.py`."""
    (cell,) = (
        cell
        for cell in read("cpu_runtime.json")["timings"]
        if (cell["model"], cell["batch"]) == (model, batch)
    )
    rows = {row["engine"]: row for row in cell["rows"]}
    both = [rows[name] for name in ("bf16", "bf16 compiled") if name in rows]
    return {**rows, "best bf16": max(both, key=lambda row: row["times_faster_than_float32"])}


def file_sizes() -> dict[str, float]:
    """Engine -> MB of the 35.7 M DDPM's weights on disk."""
    cells = read("cpu_runtime.json")["footprints"]
    sizes = {cell["engines"][0]: cell["file_mb"] for cell in cells if cell["model"] == "paper"}
    sizes["best bf16"] = sizes["float32"] / 2
    sizes["openvino nncf int8 bf16"] = sizes["openvino nncf int8"]
    return sizes


@table
def headline_speed() -> str:
    """Times as fast as eager float32, the best of each column bold, and times smaller."""
    columns = []
    for model, batch in HEADLINE:
        found = timing(model, batch)
        values = {
            name: found[name]["times_faster_than_float32"]
            for name in HEADLINE_ENGINES
            if name in found
        }
        best = max(values.values())
        columns.append(
            {
                name: f"**{value:.1f}**" if value == best else f"{value:.1f}"
                for name, value in values.items()
            }
        )
    sizes = file_sizes()
    rows = [
        [
            ENGINES[name],
            *[column.get(name, "") for column in columns],
            f"{sizes['float32'] / sizes[name]:.1f}",
        ]
        for name in HEADLINE_ENGINES
    ]
    heads = [f"{MODELS[model]}, batch {batch}" for model, batch in HEADLINE]
    return markdown(["Times as fast as float32", *heads, "Times smaller file"], rows)


def speed_table(cells: Sequence[tuple[str, int]]) -> str:
    """Milliseconds and times as fast as eager float32, a row for each engine."""
    found = [timing(*cell) for cell in cells]
    rows = []
    for name, words in ENGINES.items():
        if name == "best bf16":
            continue
        values = [
            f"{rows_[name]['median_ms']:.1f} ms, {rows_[name]['times_faster_than_float32']:.2f}"
            if name in rows_
            else ""
            for rows_ in found
        ]
        if any(values):
            rows.append([words, *values])
    return markdown(["", *[f"{MODELS[model]}, batch {batch}" for model, batch in cells]], rows)


@table
def ddpm_speed() -> str:
    """Every engine on the 35.7 M DDPM."""
    return speed_table([("paper", 1), ("paper", 4), ("paper", 16)])


@table
def embedded_speed() -> str:
    """Every engine on the embedded model."""
    return speed_table([("embedded", 1), ("embedded", 4), ("embedded", 16)])


@table
def large_speed() -> str:
    """Every engine on the two large models."""
    return speed_table([("sd15", 2), ("dit-xl", 2)])


@table
def memory_modes() -> str:
    """What weights take in memory in both modes, and what the small one costs in time."""
    rows = []
    for cell in read("cpu_runtime.json")["footprints"]:
        modes = cell["memory_modes"]
        if modes is None:
            continue
        name = cell["engines"][0].removeprefix("stepquant ").upper()
        fast, low = modes["fast"], modes["low"]
        values = [f"{mode['times_smaller']:.2f}" for mode in (fast, low)]
        longer = f"{low['median_ms'] / fast['median_ms']:.1f} times as long"
        rows.append([f"{MODELS[cell['model']]}, {name}", *values, longer])
    head = ["Times smaller than float32", "`fast`", "`low`", "A call in `low` takes"]
    return markdown(head, rows)


@table
def footprints() -> str:
    """File, resident memory and load time of each engine at batch 1."""
    rows = []
    for cell in read("cpu_runtime.json")["footprints"]:
        keys = ("file_mb", "resident_model_mb", "anonymous_model_mb")
        name = f"{MODELS[cell['model']]}, {ENGINES[cell['engines'][0]]}"
        values = [f"{cell[key]:.1f} MB" for key in keys]
        rows.append([name, *values, f"{cell['load_seconds']:.1f} s"])
    return markdown(["", "File", "Resident", "Of it no mapped file", "Loads in"], rows)


@table
def large_models() -> str:
    """Peak memory and time of large models."""
    names = {
        "sd15-calibrate": "SD 1.5 UNet, `dilatequant` W4A8, 64 x 64 latents",
        "sdxl-pack": "SDXL UNet, weight-only W4",
        "flux-pack": "Flux transformer, weight-only W4",
    }
    jobs = {job["job"]: job for job in read("large_models.json")}
    rows = []
    for name, words in names.items():
        job, record = jobs[name], jobs[name]["record"]
        predicted = record.get("predicted_peak_memory_mb")
        rows.append(
            [
                words,
                f"{job['parameters'] / 1e9:.2f} B",
                f"{job['peak_gib']:.2f} GiB",
                f"{predicted * 1e6 / 2**30:.2f} GiB" if predicted else "",
                f"{record['seconds']:.0f} s",
                f"{record['times_smaller']:.2f}",
            ]
        )
    head = ["", "Parameters", "Peak memory", "Predicted", "Time", "Times smaller than float32"]
    return markdown(head, rows)


@table
def sizes() -> str:
    """Files of the published CIFAR-10 DDPM architecture."""
    rows = []
    for file in ("size_and_speed.json", "mixed_bits_size.json"):
        for name, size in read(file)["sizes"].items():
            megabytes = f"{size['checkpoint_bytes'] / 1e6:.1f} MB"
            mean = f"{size['mean_weight_bits']:.2f}"
            rows.append([name.upper(), mean, megabytes, f"{size['times_smaller']:.2f}"])
    return markdown(["Bits", "Mean weight bits", "File", "Times smaller than float32"], rows)


# Behaviours of diffusers: outcomes of `diffusers_behaviours.py`.

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


def behaviours_that(outcome: str) -> str:
    """The reasons of an outcome, a row for each behaviour and reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, row in read("diffusers_behaviours.json")["outcomes"].items():
        for kind in KINDS:
            for text in row.get(kind, {}) if kind not in PEERS else ():
                word, _, reason = text.partition(": ")
                if word == outcome:
                    # One row for layers and models that differ in names and sizes only.
                    general = re.sub(r"\(.*", "", reason.replace("|", "\\|"))
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


def filled(text: str, page: str) -> str:
    """`text` with every table that it marks made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in TABLES:
            raise SystemExit(f"{page}: no table '{name}'; expected one of {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[name]()}\n{match[4]}"

    return MARK.sub(replace, text)


def pages() -> list[Path]:
    """Every page that may have a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def outdated() -> dict[Path, str]:
    """Page -> its new text, for the pages that are not up to date."""
    texts = {page: page.read_text(encoding="utf-8") for page in pages()}
    new = {page: filled(text, page.name) for page, text in texts.items()}
    return {page: new[page] for page in texts if new[page] != texts[page]}


def main() -> None:
    """Rewrite the pages, or list those that are out of date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    check = parser.parse_args().check
    found = outdated()
    for page, text in found.items():
        print(page.relative_to(ROOT))
        if not check:
            page.write_text(text, encoding="utf-8")
    sys.exit(1 if check and found else 0)


if __name__ == "__main__":
    main()
