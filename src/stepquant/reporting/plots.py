"""Plots of the record of `stepquant.inspect`, with matplotlib (the `[evaluate]` extra)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stepquant.support.atomic import atomic_folder, check_new_folder, user_path
from stepquant.support.errors import StepQuantError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDEST = 12  # layers in `draw_widest_ranges`
ROW_INCHES = 0.16
STEP_AXIS = "timestep, in sampling order (noise at the left)"
NORMAL_KURTOSIS = 3.0


def check_plots(folder: str | Path) -> None:
    """Check, before the work, that plots can be written to the new folder `folder`.

    Raises:
        StepQuantError: matplotlib is not installed, or the folder exists.
    """
    _figure_class()
    check_new_folder(folder)


def write_plots(record: dict[str, Any], folder: str | Path) -> list[Path]:
    """Plot the record of `stepquant.inspect` to the new folder `folder`; return the PNGs' paths.

    For a float model, the plots are

    - `activation_ranges.png`: the range of every layer at every step,
    - `widest_ranges.png`: the layers with the widest ranges,
    - `unsaturated_share.png`: the in-channels that Weight Dilation can scale,
    - `kurtosis.png`: the kurtosis of the weights.

    For a packed model, they are `activation_scales.png` and `bits.png`. The write is atomic: the
    folder is complete or absent.

    Raises:
        StepQuantError: matplotlib is not installed, or the folder exists or cannot be written.
    """
    figure_class = _figure_class()
    pictures: dict[str, Callable[[type[Figure], dict[str, Any]], Figure]]
    if record["packed"]:
        pictures = {"activation_scales": draw_activation_scales, "bits": draw_bits}
    else:
        pictures = {
            "activation_ranges": draw_activation_ranges,
            "widest_ranges": draw_widest_ranges,
            "unsaturated_share": draw_unsaturated_share,
            "kurtosis": draw_kurtosis,
        }
    names = [f"{name}.png" for name in pictures]
    folder = user_path(folder)
    with atomic_folder(folder) as partial:
        for name, draw in zip(names, pictures.values(), strict=True):
            draw(figure_class, record).savefig(partial / name, dpi=130, bbox_inches="tight")
    return [folder / name for name in names]


def draw_activation_ranges(figure_class: type[Figure], record: dict[str, Any]) -> Figure:
    """Draw a heat map of the log10 width of every layer's input range at every step."""
    rows = record["layers"]
    width = np.array([np.subtract(row["high"], row["low"]) for row in rows])  # [L, T]
    figure, (axes,) = _tall(figure_class, len(rows))
    _heat_map(axes, np.log10(np.maximum(width, 1e-12)), record["timesteps"], "viridis")
    _layer_axis(axes, _float_names(rows))
    axes.set_title("width of each layer's input range (largest minus smallest activation)")
    figure.colorbar(axes.images[0], ax=axes, label="log10 of the width", fraction=0.03, pad=0.02)
    return figure


def draw_widest_ranges(figure_class: type[Figure], record: dict[str, Any]) -> Figure:
    """Draw the smallest and largest activation at each step, for the layers with widest ranges."""
    named = _by_input(record["layers"])
    named.sort(key=lambda pair: max(pair[1]["high"]) - min(pair[1]["low"]), reverse=True)
    named = named[:WIDEST]
    across = min(3, len(named))
    down = -(-len(named) // across)
    figure = figure_class(figsize=(4 * across, 2.2 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    steps = np.arange(len(record["timesteps"]))
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (name, row) in zip(grid.flat, named, strict=False):
        axes.set_visible(True)
        axes.fill_between(steps, row["low"], row["high"], alpha=0.35, linewidth=0)
        axes.plot(steps, row["low"], color="C0", linewidth=1)
        axes.plot(steps, row["high"], color="C0", linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        _step_axis(axes, record["timesteps"], 4, title=False)
    figure.supxlabel(STEP_AXIS, fontsize=9)
    figure.supylabel("activation", fontsize=9)
    figure.suptitle("smallest to largest activation at each step, the widest ranges first")
    return figure


def draw_unsaturated_share(figure_class: type[Figure], record: dict[str, Any]) -> Figure:
    """Draw bars of the share of each layer's in-channels that Weight Dilation can scale."""
    rows = record["layers"]
    values = [100 * row["unsaturated_share"] for row in rows]
    title = "in-channels that reach no weight extreme: weight dilation can scale them"
    return _bars(figure_class, _float_names(rows), values, "% of in-channels", title, end=100)


def draw_kurtosis(figure_class: type[Figure], record: dict[str, Any]) -> Figure:
    """Draw bars of the median kurtosis of each layer's out-channels, with the normal value, 3."""
    rows = record["layers"]
    values = [row["median_kurtosis"] for row in rows]
    figure = _bars(
        figure_class,
        _float_names(rows),
        values,
        "kurtosis (median over out-channels)",
        "weight kurtosis: higher means outliers that a coarse grid has to span",
    )
    axes = figure.axes[0]
    axes.axvline(NORMAL_KURTOSIS, color="C3", linewidth=1, label="normal distribution (3)")
    axes.legend(fontsize=7, loc="lower right")
    return figure


def draw_activation_scales(figure_class: type[Figure], record: dict[str, Any]) -> Figure:
    """Draw heat maps of every activation scale at every step, and of its change over the steps."""
    steps = len(record["timesteps"])
    names, tables = [], []
    for row in record["layers"]:
        for part, scales in enumerate(row["act_scale"]):
            names.append(_name(row["layer"], part, len(row["act_scale"])))
            tables.append(np.broadcast_to(np.asarray(scales), (steps,)))  # one scale: all steps
    scale = np.maximum(np.array(tables), 1e-12)  # [L, T]
    figure, (absolute, relative) = _tall(figure_class, len(names), panels=2)
    _heat_map(absolute, np.log10(scale), record["timesteps"], "viridis")
    _layer_axis(absolute, names)
    absolute.set_title("activation scale")
    figure.colorbar(absolute.images[0], ax=absolute, label="log10", fraction=0.06, pad=0.02)
    change = np.log2(scale / np.median(scale, axis=1, keepdims=True))
    reach = max(0.1, float(np.abs(change).max()))
    _heat_map(relative, change, record["timesteps"], "RdBu_r", -reach, reach)
    relative.set_yticks([])
    relative.set_title("change over the steps")
    figure.colorbar(
        relative.images[0],
        ax=relative,
        label="log2 of scale / the layer's median",
        fraction=0.06,
        pad=0.02,
    )
    return figure


def draw_bits(figure_class: type[Figure], record: dict[str, Any]) -> Figure:
    """Draw bars of the weight bits and activation bits of each layer."""
    rows = record["layers"]
    figure, (axes,) = _tall(figure_class, len(rows), width=6)
    place = np.arange(len(rows))
    for offset, what in ((-0.2, "weight"), (0.2, "activation")):
        bits = [row[f"{what}_bits"] for row in rows]
        axes.barh(place + offset, bits, height=0.4, label=f"{what}s")
    _layer_axis(axes, [row["layer"] for row in rows])
    _bar_frame(axes, len(rows), "bits", "bits of each layer")
    axes.set_xticks(range(0, 9))
    axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(1.0, 0.0))
    return figure


def _figure_class() -> type[Figure]:
    # Imported here: matplotlib is an optional extra, and its import takes longer than most verbs.
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise StepQuantError(
            "plots need the package 'matplotlib', which is not installed: run "
            "`pip install stepquant[evaluate]`"
        ) from error
    return Figure


def _name(layer: str, part: int, parts: int) -> str:
    return layer if parts == 1 else f"{layer} [{part}]"


def _float_names(rows: list[dict[str, Any]]) -> list[str]:
    """Return the layer names, with the input part's number if a layer has several."""
    parts: dict[str, int] = {}
    for row in rows:
        parts[row["layer"]] = parts.get(row["layer"], 0) + 1
    return [_name(row["layer"], row["part"], parts[row["layer"]]) for row in rows]


def _by_input(rows: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Return `(name, row)`, merged for layers of one module that share an input.

    Layers such as to_q and to_k count as sharing an input if their ranges are equal.
    """
    shared: dict[Any, tuple[list[str], dict[str, Any]]] = {}
    for name, row in zip(_float_names(rows), rows, strict=True):
        module, _, own = name.rpartition(".")
        names, _ = shared.setdefault((module, *row["low"], *row["high"]), ([], row))
        names.append(own if names else name)
    return [(", ".join(names), row) for names, row in shared.values()]


def _tall(
    figure_class: type[Figure], rows: int, panels: int = 1, width: float = 8
) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure, tall enough for one text line for each of `rows`, and its panels."""
    height = max(2.5, 1.0 + ROW_INCHES * rows)
    figure = figure_class(figsize=(width + 2 * (panels - 1), height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _heat_map(
    axes: Axes,
    values: np.ndarray,
    timesteps: list[float],
    colours: str,
    low: float | None = None,
    high: float | None = None,
) -> None:
    axes.imshow(values, aspect="auto", cmap=colours, interpolation="nearest", vmin=low, vmax=high)
    _step_axis(axes, timesteps, 8)


def _step_axis(axes: Axes, timesteps: list[float], ticks: int, title: bool = True) -> None:
    """Space the steps evenly and label about `ticks` of them with their timesteps."""
    marks = range(0, len(timesteps), -(-len(timesteps) // ticks))
    axes.set_xticks(marks, [f"{timesteps[mark]:g}" for mark in marks], fontsize=7)
    if title:
        axes.set_xlabel(STEP_AXIS, fontsize=8)


def _layer_axis(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=6)


def _bar_frame(axes: Axes, rows: int, unit: str, title: str) -> None:
    axes.set_ylim(rows - 0.5, -0.5)  # first layer at the top
    axes.set_xlabel(unit, fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    axes.set_axisbelow(True)


def _bars(
    figure_class: type[Figure],
    names: list[str],
    values: list[float],
    unit: str,
    title: str,
    end: float | None = None,
) -> Figure:
    figure, (axes,) = _tall(figure_class, len(names), width=6)
    axes.barh(range(len(names)), values, height=0.75)
    _layer_axis(axes, names)
    _bar_frame(axes, len(names), unit, title)
    if end is not None:
        axes.set_xlim(0, end)
    return figure
