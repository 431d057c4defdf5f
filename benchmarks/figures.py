"""Draws the figures of the documentation from `benchmarks/results`.

    python benchmarks/figures.py

Writes `docs/figures/NAME-light.svg` and `NAME-dark.svg`. Each file carries a SHA-256 of its numbers
and its drawing code, by which `tests/test_docs.py` finds a figure that is older than these.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quality_cells import PAPERS, WIDTHS, is_float, summary_cells
from speed_tables import ENGINES, HEADLINE, HEADLINE_ENGINES, MODELS, timing
from table_registry import ROOT, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = ROOT / "docs" / "figures"


@dataclass(frozen=True)
class Colours:
    """Of text and grid, of ourselves, and of everything else in a fixed order."""

    text: str
    grid: str
    ours: tuple[str, str]
    others: tuple[str, ...]


COLOURS = {
    "light": Colours(
        text="#30343b",
        grid="#d9dce1",
        ours=("#c2410c", "#f59e63"),
        others=("#9aa1ac", "#5b7db1", "#2f4b7c", "#7a5195", "#3f8f79"),
    ),
    "dark": Colours(
        text="#d5d9e0",
        grid="#444a54",
        ours=("#fb923c", "#b45309"),
        others=("#7d8590", "#7ea6dd", "#4f79b7", "#b58bd0", "#6cc2a8"),
    ),
}


@dataclass(frozen=True)
class Figure:
    """What is drawn (`data`, plain JSON values), how (`draw`), and the size in inches."""

    data: Callable[[], Any]
    draw: Callable[[Axes, Any, Colours], None]
    size: tuple[float, float]


# Speed.


def speed_data() -> Any:
    """Cell -> engine -> times as fast as eager float32."""
    return {
        f"{MODELS[model]},\nbatch {batch}": {
            name: timing(model, batch)[name]["times_faster_than_float32"]
            for name in HEADLINE_ENGINES
            if name in timing(model, batch)
        }
        for model, batch in HEADLINE
    }


def draw_speed(axes: Axes, data: Any, colours: Colours) -> None:
    """Grouped bars."""
    shades = dict(zip(HEADLINE_ENGINES, (*colours.others[:3], *colours.ours), strict=True))
    width = 0.16
    for number, (name, shade) in enumerate(shades.items()):
        places = [x for x, cell in enumerate(data.values()) if name in cell]
        heights = [cell[name] for cell in data.values() if name in cell]
        offset = (number - 2) * width
        places = [x + offset for x in places]
        bars = axes.bar(places, heights, 0.9 * width, color=shade, label=ENGINES[name])
        axes.bar_label(bars, fmt="%.1f", padding=1, fontsize=7, color=colours.text)
    axes.set_xticks(range(len(data)), list(data))
    axes.set_ylabel("times as fast as float32")
    axes.set_ylim(0, 11.5)
    axes.legend(ncols=2, loc="upper left", frameon=False, labelcolor=colours.text, fontsize=8)


# Quality.

RECIPES = ("minmax", *PAPERS, "stepquant")


def quality_data() -> Any:
    """Width -> recipe -> distance with its interval, and the float model's distance."""
    cells = summary_cells()
    found = {}
    for width in WIDTHS:
        found[width.upper()] = {
            name: [
                cells[name, width]["quality"]["fd_fashion"],
                *cells[name, width]["quality"]["fd_fashion_interval"],
            ]
            for name in RECIPES
            if (name, width) in cells
        }
    (float_cell,) = (cell for cell in read("quality_stepquant.jsonl") if is_float(cell))
    return {"float32": float_cell["quality"]["fd_fashion"], "widths": found}


def draw_quality(axes: Axes, data: Any, colours: Colours) -> None:
    """Points with intervals, on a logarithmic axis."""
    shades = dict(zip(RECIPES, (*colours.others, colours.ours[0]), strict=True))
    widths = data["widths"]
    for number, (name, shade) in enumerate(shades.items()):
        places = [x for x, cells in enumerate(widths.values()) if name in cells]
        triples = [cells[name] for cells in widths.values() if name in cells]
        axes.errorbar(
            [x + (number - 2.5) * 0.12 for x in places],
            [middle for middle, _, _ in triples],
            yerr=[
                [middle - low for middle, low, _ in triples],
                [high - middle for middle, _, high in triples],
            ],
            fmt="D" if name == "stepquant" else "o",
            color=shade,
            label=name,
            capsize=2,
            markersize=6,
        )
    axes.axhline(data["float32"], color=colours.text, linewidth=1, linestyle=":", label="float32")
    axes.set_yscale("log")
    axes.set_ylim(0.7, 45)
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xticks(range(len(widths)), list(widths))
    axes.set_xlim(-0.5, len(widths) - 0.5)
    axes.set_ylabel("fd_fashion, lower is better")
    axes.legend(ncols=4, loc="upper right", frameon=False, labelcolor=colours.text, fontsize=8)


# Why: activations change with the step.

LAYERS = (
    "conv_in",
    "mid_block.attentions.0.to_out.0",
    "mid_block.resnets.1.conv2",
    "up_blocks.2.resnets.0.conv2",
)


def ranges_data() -> Any:
    """Layer -> [smallest, largest] at each timestep, of its first input part."""
    record = read("activation_ranges.json")["results"]
    found = {
        entry["layer"]: [entry["low"], entry["high"]]
        for entry in record["layers"]
        if entry["layer"] in LAYERS and entry["part"] == 0
    }
    return {"timesteps": record["timesteps"], "layers": {name: found[name] for name in LAYERS}}


def draw_ranges(axes: Axes, data: Any, colours: Colours) -> None:
    """The width of each layer's range over the steps, over its widest."""
    shades = (colours.others[0], colours.others[1], colours.others[3], colours.ours[0])
    for (name, (low, high)), shade in zip(data["layers"].items(), shades, strict=True):
        spans = [top - bottom for bottom, top in zip(low, high, strict=True)]
        widest = max(spans)
        axes.plot(data["timesteps"], [span / widest for span in spans], color=shade, label=name)
    axes.invert_xaxis()
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("timestep, from noise to image")
    axes.set_ylabel("width of the input's range,\nover its widest")
    axes.legend(loc="lower left", frameon=False, labelcolor=colours.text, fontsize=8)


# TCAQ-DM: exposure drift.


def drift_data() -> Any:
    """Round -> block -> relative squared difference of its inputs, where there is any."""
    rounds = read("exposure_drift.json")["rounds"]
    return [{name: value for name, value in blocks.items() if value} for blocks in rounds]


def draw_drift(axes: Axes, data: Any, colours: Colours) -> None:
    """A line for each round, over the blocks in execution order."""
    for number, blocks in enumerate(data):
        shade = (*colours.others[:3], colours.ours[0])[number]
        words = "1 round" if number == 1 else f"{number} rounds"
        axes.plot(range(len(blocks)), blocks.values(), marker=".", color=shade, label=words)
    names = [name.replace("_blocks", "").replace("resnets", "res") for name in data[0]]
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("relative squared\ndifference of inputs")
    axes.legend(frameon=False, labelcolor=colours.text, fontsize=8, ncols=4)


FIGURES = {
    "speed": Figure(speed_data, draw_speed, (8.6, 3.6)),
    "quality": Figure(quality_data, draw_quality, (8.6, 3.4)),
    "activation-ranges": Figure(ranges_data, draw_ranges, (8.6, 3.0)),
    "exposure-drift": Figure(drift_data, draw_drift, (8.6, 3.4)),
}


def digest(name: str) -> str:
    """SHA-256 of the numbers that the figure shows, and of the function that draws them."""
    figure = FIGURES[name]
    text = json.dumps(figure.data(), sort_keys=True) + inspect.getsource(figure.draw)
    return hashlib.sha256(text.encode()).hexdigest()


def is_up_to_date(name: str) -> bool:
    """Whether both files were drawn from the numbers in `benchmarks/results`."""
    wanted = digest(name)
    files = [FOLDER / f"{name}-{scheme}.svg" for scheme in COLOURS]
    return all(file.is_file() and wanted in file.read_text(encoding="utf-8") for file in files)


def write(name: str, folder: Path = FOLDER) -> None:
    """Draw one figure in both colour schemes."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    figure = FIGURES[name]
    data = figure.data()
    for scheme, colours in COLOURS.items():
        style = {
            "svg.hashsalt": "stepquant",  # the same bytes each time
            "font.size": 9,
            "text.color": colours.text,
            "axes.labelcolor": colours.text,
            "axes.edgecolor": colours.grid,
            "xtick.color": colours.text,
            "ytick.color": colours.text,
        }
        with matplotlib.rc_context(style):
            canvas = Canvas(figsize=figure.size, layout="constrained")
            axes = canvas.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=colours.grid, linewidth=0.6)
            axes.set_axisbelow(True)
            figure.draw(axes, data, colours)
            metadata = {"Date": None, "Description": f"sha256 {digest(name)}"}
            canvas.savefig(folder / f"{name}-{scheme}.svg", transparent=True, metadata=metadata)


def main() -> None:
    """Draw what is older than its numbers."""
    FOLDER.mkdir(exist_ok=True)
    for name in FIGURES:
        if is_up_to_date(name):
            print(f"{name} is up to date")
        else:
            write(name)
            print(f"{name} drawn")


if __name__ == "__main__":
    main()
