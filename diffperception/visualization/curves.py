"""Curves of training runs, of the sampler's settings and of label efficiency, as PIL images."""

import csv
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[list[int], list[float]]  # steps and values

MARKERS, DASHES = "osD^vP", ("-", "--", ":", "-.")


def training_curves(csv_path: str | Path) -> Image.Image:
    """Losses and metrics over the steps of a run, from its `metrics.csv`; ValueError where nothing was logged yet.

    The first panel has the training losses: the columns that begin with `train/loss`. Columns that begin with `val/`
    are drawn beside them, those whose names begin with the same word in one panel: AP and AP50, but not AR100.
    """
    panels: dict[str, dict[str, Points]] = {}
    for column, points in read_metrics(csv_path).items():
        kind, _, name = column.rpartition("/")
        if kind == "val":
            word = re.split(r"(?<=[A-Z])(?=[^A-Z])|[^A-Za-z]", name)[0]
            panels.setdefault(f"validation {word}", {})[name] = points
        elif name.startswith("loss"):
            panels.setdefault("training loss", {})[name] = points
    if not panels:
        raise ValueError(f"{csv_path} has neither losses nor metrics: nothing was logged yet")
    figure, row = _subplots(len(panels))
    for axes, (title, lines) in zip(row, panels.items(), strict=True):
        for name, (steps, values) in lines.items():
            if title == "training loss":
                line = axes.plot(steps, _smooth(values), label=name, linewidth=2 if name == "loss" else 1.2)[0]
                axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
            else:
                axes.plot(steps, values, label=f"{name} {values[-1]:.3f}", marker="o", markersize=3)
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return _render(figure)


def sweep_curves(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """AP against passes through the head and against seconds, a line for each setting of the sampler but the steps.

    Args:
        rows: settings by their names; `head_passes`, `seconds_per_image`, and `AP` with `mean` and `spread` (bars; null
            for none). Lines have the color of their mode.
    """
    names = [name for name in rows[0] if name not in ("steps", "head_passes", "seconds_per_image", "AP", "AP50")]
    values = {name: list(dict.fromkeys(row[name] for row in rows)) for name in names}
    varied = [name for name in names if name == "mode" or len(values[name]) > 1]
    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["head_passes"]):
        lines.setdefault(tuple(row[name] for name in varied), []).append(row)
    looks = list(dict.fromkeys(setting[1:] for setting in lines))  # of all but the mode, which comes first
    figure, (left, right) = _subplots(2, sharey=True)
    for setting, points in lines.items():
        mean, spread = (np.array([p["AP"][key] for p in points], dtype=float) for key in ("mean", "spread"))
        look = looks.index(setting[1:])
        style: dict[str, Any] = {
            "color": f"C{values['mode'].index(setting[0])}",
            "linestyle": DASHES[look % len(DASHES)],
            "marker": MARKERS[look % len(MARKERS)],
            "label": ", ".join([setting[0], *map(_in_words, varied[1:], setting[1:])]),
        }
        bars = None if np.isnan(spread).any() else spread
        for axes, key in ((left, "head_passes"), (right, "seconds_per_image")):
            axes.errorbar([point[key] for point in points], mean, bars, capsize=3, markersize=4, linewidth=1.3, **style)
    left.set(title="AP against head passes", xlabel="passes through the head per image", ylabel="AP")
    _doubling(left, [row["head_passes"] for row in rows])
    right.set(title="AP against time", xlabel="seconds per image")
    right.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _render(figure)


def _in_words(setting: str, value: Any) -> str:
    """A setting of the sampler in a legend."""
    return "from noise" if setting == "start_time" and value is None else f"{setting} {value}"


def label_curves(summary: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Image.Image:
    """mIoU against the number of labelled images, a line per method with bars of its spread.

    Args:
        summary: a dict per method and number: `method`, `labels`, `miou` (0..1) and `spread` (null for none).
        titles: of the methods.
    """
    figure, (axes,) = _subplots(1)
    for number, method in enumerate(dict.fromkeys(cell["method"] for cell in summary)):
        cells = [cell for cell in summary if cell["method"] == method]
        mean, spread = [100 * c["miou"] for c in cells], [100 * (c["spread"] or 0) for c in cells]
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar([c["labels"] for c in cells], mean, spread, label=titles[method], marker=marker, capsize=3)
    axes.set(title="mIoU against labelled images", xlabel="labelled images", ylabel="mIoU in percent")
    _doubling(axes, [cell["labels"] for cell in summary])
    axes.legend(frameon=False)
    return _render(figure)


def histograms(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Image.Image:
    """How values of several sets are spread, a panel per title, in the same bins: the share of each set in a bin."""
    figure, row = _subplots(len(panels))
    for axes, (title, sets) in zip(row, panels.items(), strict=True):
        bins = np.histogram_bin_edges(np.concatenate([np.asarray(values) for values in sets.values()]), 30).tolist()
        for name, values in sets.items():
            axes.hist(values, bins, weights=np.full(len(values), 1 / len(values)), alpha=0.6, label=name)
        axes.set(title=title, ylabel="share of the images")
        axes.legend(frameon=False)
    return _render(figure)


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str, labels: tuple[str, str]
) -> Image.Image:
    """A table as colors, with its numbers in percent; NaN stays empty.

    Args:
        values: of each row, 0..1.
        rows, columns: their names.
        labels: what rows and columns are.
    """
    figure, (axes,) = _subplots(1)
    table = 100 * np.array(values, dtype=float)
    picture = axes.imshow(table, aspect="auto", cmap="viridis")
    middle = (np.nanmin(table) + np.nanmax(table)) / 2
    for (i, j), value in np.ndenumerate(table):
        if not math.isnan(value):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value < middle else "black")
    axes.set(title=title, xlabel=labels[1], ylabel=labels[0])
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    figure.colorbar(picture)
    return _render(figure)


def read_metrics(csv_path: str | Path) -> dict[str, Points]:
    """The steps and finite values of each column of a metrics.csv, whose cells may be empty."""
    series: dict[str, Points] = {}
    with open(csv_path, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                if name not in ("step", "epoch") and value and math.isfinite(float(value)):
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(line["step"]))
                    values.append(float(value))
    return series


def _doubling(axes: "Axes", counts: Sequence[int]) -> None:
    """An axis of counts that double."""
    ticks = sorted(set(counts))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(count) for count in ticks], minor=False)
    axes.grid(alpha=0.3)


def _subplots(panels: int, sharey: bool = False) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5 * panels, 4.2), dpi=110, layout="constrained")
    return figure, figure.subplots(1, panels, sharey=sharey, squeeze=False)[0]


def _render(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over a window of a twentieth of the run, shorter at its ends."""
    window = np.ones(min(len(values), 2 * (len(values) // 40) + 1))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
