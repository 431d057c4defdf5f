"""Markdown tables of `cpu_runtime.py`'s cells."""

from __future__ import annotations

from typing import Any

TIMING_HEAD = (
    "| model | batch | engine | ms | p10 to p90 | times float32 | times NNCF INT8 "
    "| times NNCF INT8, bf16 | share of int8 peak |",
    "|---|---|---|---|---|---|---|---|---|",
)
FOOTPRINT_HEAD = (
    "| model | engine | file MB | resident MB | of it no mapped file | load s | first call s |",
    "|---|---|---|---|---|---|---|",
)


def ratio(value: float | None) -> str:
    """Two decimals, or nothing where it was not measured."""
    return "" if value is None else f"{value:.2f}"


def timing_table(records: list[dict[str, Any]]) -> str:
    """A line for each engine of each cell; an engine that failed has its error as last column."""
    lines = list(TIMING_HEAD)
    for record in records:
        for row in record["rows"]:
            start = f"| {record['model']} | {record['batch']} | {row['engine']} |"
            if "error" in row:
                lines.append(f"{start} | | | | | {cell_text(row['error'])} |")
                continue
            lines.append(
                f"{start} {row['median_ms']:.1f} | {row['p10_ms']:.1f} to {row['p90_ms']:.1f} | "
                f"{ratio(row['times_faster_than_float32'])} | "
                f"{ratio(row.get('times_faster_than_openvino_nncf_int8'))} | "
                f"{ratio(row.get('times_faster_than_openvino_nncf_int8_bf16'))} | "
                f"{ratio(row['share_of_int8_peak'])} |"
            )
    return "\n".join(lines) + "\n"


def footprint_table(records: list[dict[str, Any]]) -> str:
    """A line for each engine of each model."""
    lines = list(FOOTPRINT_HEAD)
    for record in records:
        start = f"| {record['model']} | {record['engines'][0]} |"
        if "error" in record:
            lines.append(f"{start} | | | | {cell_text(record['error'])} |")
            continue
        lines.append(
            f"{start} {record['file_mb']:.1f} | {record['resident_model_mb']:.1f} | "
            f"{record['anonymous_model_mb']:.1f} | {record['load_seconds']:.1f} | "
            f"{record['first_call_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def cell_text(text: str) -> str:
    """`text` on one line, with nothing that a table takes for its own."""
    return " ".join(text.split()).replace("|", "/")
