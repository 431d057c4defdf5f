"""What tables and figures read in a cell of `quality.py`, its siblings and the ablations."""

from __future__ import annotations

from table_registry import Record, read

WIDTHS = ("w4a8", "w4a4", "w2a4")
PAPERS = ("q-diffusion", "dilatequant", "tcaq-dm", "mpq-dm")


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


def summary_cells() -> dict[tuple[str, str], Record]:
    """`(recipe, width)` -> cell of 512 images, as measured with like settings."""
    cells: dict[tuple[str, str], Record] = {}
    for cell in read("quality_stepquant.jsonl") + read("quality_tcaq_dm.jsonl"):
        if not is_float(cell):
            cells.setdefault((label(cell), cell["quantize"]["bits"]), cell)
    return cells
