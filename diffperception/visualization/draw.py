"""Pictures: detections, predictions beside the ground truth, noise turning into boxes, and the curves of a run.

Images come in as float32 (3, H, W), RGB, 0..1, and boxes as xyxy in their pixels; pictures come out as PIL images.
"""

import colorsys
import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.utils import make_grid

from diffperception.files import written_beside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Points = tuple[list[int], list[float]]  # steps and values

LEAST_SIDE, MOST_SIDE = 480, 1600  # of the long side of pictures in pixels: text is legible, files stay small
STRIP_SIDE = 360  # long side of the pictures of a strip
THRESHOLD = 0.4  # detections with lower scores are not drawn
MATCH_IOU = 0.5
WRONG: Colour = (235, 30, 30)  # no class has a red like this
GREY: Colour = (150, 150, 150)
INK: Colour = (25, 25, 25)
PAPER: Colour = (255, 255, 255)


class Mark(NamedTuple):
    """A box to draw: xyxy in pixels, with a text beside it unless that is empty."""

    box: Box
    colour: Colour
    text: str = ""
    opacity: float = 1.0
    dashed: bool = False


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a picture beside `path` and rename it, so that `path` is never half a file."""
    with written_beside(Path(path)) as part:
        picture.save(part, format="png")


def draw_detections(
    image: Tensor, detections: Mapping[str, Any], classes: Sequence[str], threshold: float = THRESHOLD
) -> Image.Image:
    """The image with its boxes, class names and, for predictions, scores.

    Args:
        image: (3, H, W).
        detections: `boxes` (n, 4), `labels` (n,), and `scores` (n,) for predictions but not for ground truth.
        threshold: predictions with lower scores are left out.
    """
    return paint(image, _marks(detections, classes, threshold))


def side_by_side(
    image: Tensor,
    target: Mapping[str, Any],
    prediction: Mapping[str, Any],
    classes: Sequence[str],
    threshold: float = THRESHOLD,
) -> Image.Image:
    """Ground truth on the left, prediction on the right; missed objects and wrong predictions are dashed and red.

    A prediction is right if it is the best-scored one to overlap an object of its class with IoU 0.5. Crowds are grey.
    """
    shown = _above(prediction, threshold)
    crowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(target["labels"])))).cpu().bool()
    found, right = match(target, shown, crowd)
    objects = [
        _judged(box, k, text, bool(good), "missed") if not is_crowd else Mark(box, GREY, f"{text} (crowd)")
        for (box, k, text), good, is_crowd in zip(_read(target, classes), found, crowd, strict=True)
    ]
    boxes = [
        _judged(box, k, text, bool(good), "wrong")
        for (box, k, text), good in zip(_read(shown, classes), right, strict=True)
    ]
    number, missed = int((~crowd).sum()), int((~found & ~crowd).sum())
    left = f"ground truth: {number} objects, {missed} missed"
    right_title = f"prediction (score from {threshold:g}): {len(right)} boxes, {int((~right).sum())} wrong"
    return stack([titled(paint(image, objects), left), titled(paint(image, boxes), right_title)])


def trajectory_strip(
    image: Tensor,
    trace: Sequence[Mapping[str, Any]],
    detections: Mapping[str, Any],
    classes: Sequence[str],
    threshold: float = THRESHOLD,
    columns: int = 6,
) -> Image.Image:
    """Noise turning into boxes: the noisy boxes before some of the steps, the boxes after the last, the detections.

    Args:
        image: (3, H, W).
        trace: a dict a step, noisiest first: `t`, noisy `boxes` (N, 4), `predicted` (N, 4), `scores` (N,) and `labels`
            (N,). A box has the colour of the class it becomes in that step, and is the fainter the lower its score.
        detections: `boxes`, `labels` and `scores` after the last step.
        columns: at most this many pictures, at least 3.
    """
    count = min(len(trace), columns - 2)
    steps = [trace[round(i)] for i in np.linspace(0, len(trace) - 1, count)] if count > 1 else [trace[0]]
    pictures = [titled(_faint(image, step["boxes"], step), f"t = {step['t']}") for step in steps]
    pictures[0] = titled(_faint(image, steps[0]["boxes"], steps[0]), f"t = {steps[0]['t']}: noise")
    pictures.append(titled(_faint(image, trace[-1]["predicted"], trace[-1]), f"all {len(trace[-1]['boxes'])} boxes"))
    last = paint(image, _marks(detections, classes, threshold), STRIP_SIDE)
    return stack([*pictures, titled(last, f"detections (score from {threshold:g})")])


def image_grid(images: Sequence[Tensor], columns: int | None = None) -> Image.Image:
    """Images of one size, float (C, H, W) in 0..1 with 1 or 3 channels, in rows; about as many rows as columns."""
    return to_picture(make_grid(list(images), columns or math.ceil(math.sqrt(len(images))), padding=2, pad_value=1.0))


def curves(csv_path: str | Path) -> Image.Image:
    """Losses and scores over the steps of a run, from its `metrics.csv`.

    Columns that begin with `loss` are losses; those that begin with `held_out` or `accuracy`, and AP, AP50 and AP75,
    are drawn beside them; a prefix such as `train/` does not count.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or no number in it.
    """
    series = read_metrics(csv_path)
    losses = {name: points for name, points in series.items() if name.startswith("loss")}
    scores: dict[str, Points] = {name: series[name] for name in ("AP", "AP50", "AP75") if name in series}
    held_out = {name: points for name, points in series.items() if name.startswith("held_out")}
    accuracy = {name: points for name, points in series.items() if name.startswith("accuracy")}
    kinds = (
        ("training loss", losses),
        ("held-out loss", held_out),
        ("validation accuracy", accuracy),
        ("validation AP", scores),
    )
    panels = [(kind, lines) for kind, lines in kinds if lines]
    if not panels:
        raise ValueError(f"{csv_path} has no loss and no AP: nothing was logged yet")
    figure = _figure(len(panels))
    for axes, (kind, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _plot(axes, kind, lines)
    return _render(figure)


def audit_curves(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """AP against passes through the head and against seconds, a line for each setting of the sampler but the steps.

    Args:
        rows: as in audit.json: settings, `head_passes`, `AP` with `mean` and `spread` (bars; null for none), and
            `seconds_per_image`. Lines have the colour of their mode.
    """
    names = ("mode", "num_boxes", "renewal_threshold", "ensemble", "eta", "nms_threshold")
    values = {name: list(dict.fromkeys(row[name] for row in rows)) for name in names}
    lines: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["head_passes"]):
        lines.setdefault(tuple(row[name] for name in names), []).append(row)
    looks = list(dict.fromkeys(setting[1:] for setting in lines))  # of all but the mode
    figure = _figure(2)
    left, right = figure.subplots(1, 2, sharey=True)
    for setting, points in lines.items():
        look = looks.index(setting[1:])
        style: dict[str, Any] = {
            "color": f"C{values['mode'].index(setting[0])}",
            "linestyle": ("-", "--", ":", "-.")[look % 4],
            "marker": "osD^vP"[look % 6],
            "label": _audit_label(setting, [len(values[name]) > 1 for name in names]),
        }
        _plot_audit(left, "head_passes", points, style)
        _plot_audit(right, "seconds_per_image", points, style)
    passes = sorted({row["head_passes"] for row in rows})
    left.set(title="AP against head passes", xlabel="passes through the head, an image", ylabel="AP")
    left.set_xscale("log", base=2)
    left.set_xticks(passes, [str(count) for count in passes], minor=False)
    right.set(title="AP against time", xlabel="seconds an image")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return _render(figure)


def label_curves(summary: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> Image.Image:
    """mIoU against the number of labelled images, a line a method with bars of its spread.

    Args:
        summary: a dict a method and number: `method`, `labels`, `miou` (0..1) and `spread` (null for none).
        titles: of the methods.
    """
    figure = _figure(1)
    axes = figure.subplots()
    for number, method in enumerate(dict.fromkeys(cell["method"] for cell in summary)):
        cells = [cell for cell in summary if cell["method"] == method]
        mean, spread = [100 * c["miou"] for c in cells], [100 * (c["spread"] or 0) for c in cells]
        marker = "osD^vP"[number % 6]
        axes.errorbar([c["labels"] for c in cells], mean, spread, label=titles[method], marker=marker, capsize=3)
    counts = sorted({cell["labels"] for cell in summary})
    axes.set(title="mIoU against labelled images", xlabel="labelled images", ylabel="mIoU in percent")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _render(figure)


def heat_map(
    values: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str], title: str, labels: tuple[str, str]
) -> Image.Image:
    """A table as colours, with its numbers in percent; NaN stays empty.

    Args:
        values: of each row, 0..1.
        rows, columns: their names.
        labels: what rows and columns are.
    """
    figure = _figure(1)
    axes = figure.subplots()
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
    if not Path(csv_path).is_file():
        raise FileNotFoundError(f"there is no log {csv_path}")
    series: dict[str, Points] = {}
    with open(csv_path, newline="") as file:
        for line in csv.DictReader(file):
            for name, value in line.items():
                if name not in ("step", "epoch") and value and math.isfinite(float(value)):
                    steps, values = series.setdefault(name.rpartition("/")[2], ([], []))
                    steps.append(int(line["step"]))
                    values.append(float(value))
    return series


def class_colour(k: int) -> Colour:
    """A colour for class k: hues by the golden ratio, far apart for neighbours, none of them red."""
    hue = 0.10 + 0.82 * ((0.55 + k * 0.61803398875) % 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, (1.0, 0.8)[k // 8 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def match(target: Mapping[str, Any], prediction: Mapping[str, Any], crowd: Tensor) -> tuple[Tensor, Tensor]:
    """Which objects are found (n,) and which predictions are right (m,): greedily, the best score first."""
    overlap = box_iou(target["boxes"].cpu().float(), prediction["boxes"].cpu().float())
    overlap[target["labels"].cpu()[:, None] != prediction["labels"].cpu()] = 0
    overlap[crowd] = 0
    found = torch.zeros(overlap.shape[0], dtype=torch.bool)
    right = torch.zeros(overlap.shape[1], dtype=torch.bool)
    for j in prediction["scores"].argsort(descending=True).tolist():
        free = overlap[:, j].masked_fill(found, 0)
        if len(free) and free.max() >= MATCH_IOU:
            found[free.argmax()] = right[j] = True
    return found, right


def stack(pictures: Sequence[Image.Image], vertical: bool = False, gap: int = 8) -> Image.Image:
    """The pictures from left to right, or from top to bottom."""
    axis = int(vertical)
    size = [max(picture.size[i] for picture in pictures) for i in (0, 1)]
    size[axis] = sum(picture.size[axis] for picture in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGB", (size[0], size[1]), PAPER)
    corner = [0, 0]
    for picture in pictures:
        whole.paste(picture, (corner[0], corner[1]))
        corner[axis] += picture.size[axis] + gap
    return whole


def titled(picture: Image.Image, title: str) -> Image.Image:
    """The picture with a line of text above it."""
    font = _font(18)
    width = max(picture.width, math.ceil(font.getlength(title)) + 8)
    whole = Image.new("RGB", (width, picture.height + 28), PAPER)
    whole.paste(picture, (0, 28))
    ImageDraw.Draw(whole).text((4, 3), title, fill=INK, font=font)
    return whole


def paint(image: Tensor, marks: Sequence[Mark], side: int | None = None) -> Image.Image:
    """The image with marks: first the boxes, then the texts above them all.

    Args:
        image: (3, H, W).
        marks: the most important last.
        side: resize the long side to this many pixels; by default small images are enlarged by a whole factor, and
            large ones are made smaller.
    """
    picture = to_picture(image)
    long = max(picture.size)
    factor = (side or min(long * math.ceil(LEAST_SIDE / long), MOST_SIDE)) / long
    size = round(picture.width * factor), round(picture.height * factor)
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    scaled = [mark._replace(box=_scaled(mark.box, factor)) for mark in marks]
    draw = ImageDraw.Draw(picture, "RGBA")
    width = max(2, round(max(picture.size) / 320))
    for mark in scaled:
        _draw_box(draw, mark, width)
    taken: list[Box] = []
    for mark in reversed(scaled):  # the best is drawn last, so it chooses the place of its text first
        if mark.text:
            _draw_text(draw, mark, picture.size, taken)
    return picture


def _scaled(box: Box, factor: float) -> Box:
    return box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor


def to_picture(image: Tensor) -> Image.Image:
    """Float (3, H, W) in 0..1 -> PIL image."""
    pixels = (image.detach().cpu().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _above(detections: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The detections with at least this score, the best last; all of them where there are no scores."""
    if "scores" not in detections:
        return dict(detections)
    order = detections["scores"].argsort()
    order = order[detections["scores"][order] >= threshold]
    return {key: detections[key][order] for key in ("boxes", "scores", "labels")}


def _read(detections: Mapping[str, Any], classes: Sequence[str]) -> list[tuple[Box, int, str]]:
    """Box, label and text of each detection."""
    labels = detections["labels"].tolist()
    scores = [f" {s:.2f}" for s in detections["scores"].tolist()] if "scores" in detections else [""] * len(labels)
    boxes = [tuple(box) for box in detections["boxes"].tolist()]
    return [(box, k, f"{classes[k]}{s}") for box, k, s in zip(boxes, labels, scores, strict=True)]


def _marks(detections: Mapping[str, Any], classes: Sequence[str], threshold: float) -> list[Mark]:
    return [Mark(box, class_colour(k), text) for box, k, text in _read(_above(detections, threshold), classes)]


def _judged(box: Box, k: int, text: str, good: bool, verdict: str) -> Mark:
    return Mark(box, class_colour(k), text) if good else Mark(box, WRONG, f"{verdict}: {text}", dashed=True)


def _faint(image: Tensor, boxes: Tensor, step: Mapping[str, Any]) -> Image.Image:
    """All boxes of a step on the darkened image, the lower their scores the fainter."""
    order = step["scores"].argsort().tolist()
    scores, labels, corners = step["scores"].tolist(), step["labels"].tolist(), boxes.tolist()
    marks = [Mark(tuple(corners[i]), class_colour(labels[i]), "", 0.12 + 0.88 * scores[i]) for i in order]
    return paint(0.5 * image, marks, STRIP_SIDE)


def _draw_box(draw: ImageDraw.ImageDraw, mark: Mark, width: int) -> None:
    x1, y1, x2, y2 = mark.box
    fill = (*mark.colour, round(255 * mark.opacity))
    if not mark.dashed:
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=fill, width=width)
        return
    inset = width / 2  # a line is centred on its coordinates, an outline lies inside them
    for level in (y1 + inset, y2 - inset):
        for start, end in _dashes(x1, x2, 4 * width):
            draw.line((start, level, end, level), fill=fill, width=width)
    for level in (x1 + inset, x2 - inset):
        for start, end in _dashes(y1, y2, 4 * width):
            draw.line((level, start, level, end), fill=fill, width=width)


def _dashes(start: float, end: float, length: float) -> list[tuple[float, float]]:
    return [(a, min(a + length, end)) for a in np.arange(start, end, 1.7 * length).tolist()]


def _draw_text(draw: ImageDraw.ImageDraw, mark: Mark, size: tuple[int, int], taken: list[Box]) -> None:
    font = _font(14)
    width, height = math.ceil(font.getlength(mark.text)) + 6, 18
    box = _place(mark.box, width, height, size, taken)
    taken.append(box)
    draw.rectangle(box, fill=(*mark.colour, 225))
    dark = 0.299 * mark.colour[0] + 0.587 * mark.colour[1] + 0.114 * mark.colour[2] > 140
    draw.text((box[0] + 3, box[1]), mark.text, fill=INK if dark else PAPER, font=font)


def _place(box: Box, width: int, height: int, size: tuple[int, int], taken: list[Box]) -> Box:
    """Where the text of a box goes: above, inside at the top, inside at the bottom or below, the first that is free."""
    x1, y1, x2, y2 = box
    places = []
    for y in (y1 - height, y1, y2 - height, y2):
        for x in (x1, x2 - width):
            left, top = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
            places.append((left, top, left + width, top + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # a size asks for the scalable font
    return font


def _figure(panels: int) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(6.5 * panels, 4.2), dpi=110, layout="constrained")


def _render(figure: "Figure") -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _audit_label(setting: tuple[Any, ...], told: Sequence[bool]) -> str:
    """The mode, and what differs between the lines beside it."""
    mode, boxes, renewal, ensemble, eta, nms = setting
    pooled = "ensemble" if ensemble else "last step only"
    others = (f"{boxes} boxes", f"renewal {renewal}", pooled, f"eta {eta}", f"NMS {nms}")
    return ", ".join([mode, *itertools.compress(others, told[1:])])


def _plot_audit(axes: "Axes", key: str, points: Sequence[Mapping[str, Any]], style: Mapping[str, Any]) -> None:
    mean = [math.nan if point["AP"]["mean"] is None else point["AP"]["mean"] for point in points]
    spread = [point["AP"]["spread"] for point in points]
    bars = None if None in spread else spread
    axes.errorbar([point[key] for point in points], mean, bars, capsize=3, markersize=4, linewidth=1.3, **style)


def _plot(axes: "Axes", title: str, lines: Mapping[str, Points]) -> None:
    for name, (steps, values) in lines.items():
        if title == "training loss":
            label, width = name.removeprefix("loss_"), 2 if name == "loss" else 1.2
            line = axes.plot(steps, _smooth(values), label=label, linewidth=width)[0]
            axes.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.8)
        else:
            axes.plot(steps, values, label=f"{name} {values[-1]:.3f}", marker="o", markersize=3)
    axes.set(title=title, xlabel="step")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Mean over a window of a twentieth of the run, shorter at its ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    half = len(values) // 40
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
