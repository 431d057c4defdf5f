"""Tables of what a method's parts bring."""

from __future__ import annotations

from quality_cells import distance, is_float, label, psnr, ratio
from table_registry import markdown, read, table


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
