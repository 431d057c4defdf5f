"""Tables of image quality: recipes, widths, conditions, samplers."""

from __future__ import annotations

from quality_cells import (
    PAPERS,
    WIDTHS,
    bits,
    distance,
    is_float,
    label,
    psnr,
    ratio,
    seconds,
    smaller,
    summary_cells,
)
from table_registry import Record, markdown, read, table


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
