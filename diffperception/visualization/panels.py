"""Images beside each other: predictions and ground truth, noise turning into boxes, labels and their uncertainty.

What comes in and out is as in `draw`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.utils import draw_segmentation_masks, make_grid

from diffperception.data.masks import IGNORE_INDEX
from diffperception.visualization.draw import (
    INK,
    MASK_OPACITY,
    PAPER,
    THRESHOLD,
    Color,
    best_last,
    captions,
    class_color,
    draw_boxes,
    draw_detections,
    to_pil,
)
from diffperception.visualization.fonts import text_width, write_line

PANEL_SIDE = 360  # long side in pixels of images of which many are beside each other
TRAJECTORY_PANELS = 6  # at most
MATCH_IOU = 0.5
MAX_UNCERTAINTY = math.log(2)  # half of the members are sure of one class, and half of another
LEGEND_COLUMNS = 10
WRONG: Color = (235, 30, 30)  # no class has a red like this
GREY: Color = (150, 150, 150)
RIGHT: Color = (30, 170, 60)


def side_by_side(
    image: Tensor,
    target: Mapping[str, Any],
    prediction: Mapping[str, Any],
    classes: Sequence[str],
    threshold: float = THRESHOLD,
) -> Image.Image:
    """Ground truth on the left, prediction on the right; missed objects and false positives are red.

    A prediction is right if it is the best-scored one to overlap an object of its class with IoU 0.5. Crowds are grey.
    """
    shown = best_last(prediction, threshold)
    crowd = torch.as_tensor(target.get("iscrowd", torch.zeros(len(target["labels"])))).cpu().bool()
    found, correct = match_boxes(target, shown, crowd)
    missed, wrong = (~found & ~crowd).tolist(), (~correct).tolist()
    objects = _judged(image, best_last(target, 0), classes, missed, "missed", crowd.tolist())
    boxes = _judged(image, shown, classes, wrong, "wrong", [False] * len(wrong))
    left = f"ground truth: {int((~crowd).sum())} objects, {sum(missed)} missed"
    right = f"prediction (score from {threshold:g}): {len(wrong)} boxes, {sum(wrong)} wrong"
    return stack([titled(objects, left), titled(boxes, right)])


def _judged(
    image: Tensor, boxes: Mapping[str, Any], classes: Sequence[str], bad: list[bool], verdict: str, crowd: list[bool]
) -> Image.Image:
    rows = list(zip(boxes["labels"].tolist(), captions(boxes, classes), bad, crowd, strict=True))
    colors = [WRONG if is_bad else GREY if is_crowd else class_color(k) for k, _, is_bad, is_crowd in rows]
    texts = [f"{verdict}: {text}" if b else f"{text} (crowd)" if c else text for _, text, b, c in rows]
    return draw_boxes(image, boxes["boxes"], colors, texts, masks=boxes.get("masks"))


def match_boxes(target: Mapping[str, Any], prediction: Mapping[str, Any], crowd: Tensor) -> tuple[Tensor, Tensor]:
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


def trajectory(
    image: Tensor,
    trace: Sequence[Mapping[str, Any]],
    detections: Mapping[str, Any],
    classes: Sequence[str],
    threshold: float = THRESHOLD,
) -> Image.Image:
    """The sampler's trajectory: noisy boxes before some of the steps, the boxes after the last, the detections.

    Args:
        image: (3, H, W).
        trace: a dict per step, noisiest first: `t`, noisy `boxes` (N, 4), `predicted` (N, 4), `scores` (N,) and
            `labels` (N,). A box has the color of the class it becomes in that step, and is the fainter the
            lower its score.
        detections: `boxes`, `labels` and `scores` after the last step.
    """
    count = min(len(trace), TRAJECTORY_PANELS - 2)
    steps = [trace[round(i)] for i in np.linspace(0, len(trace) - 1, count)] if count > 1 else [trace[0]]
    titles = [f"t = {step['t']}{': noise' if step is steps[0] else ''}" for step in steps]
    panels = [titled(_by_score(image, s["boxes"], s), title) for s, title in zip(steps, titles, strict=True)]
    panels.append(titled(_by_score(image, trace[-1]["predicted"], trace[-1]), f"all {len(trace[-1]['boxes'])} boxes"))
    last = draw_detections(image, detections, classes, threshold, PANEL_SIDE)
    return stack([*panels, titled(last, f"detections (score from {threshold:g})")])


def _by_score(image: Tensor, boxes: Tensor, step: Mapping[str, Any]) -> Image.Image:
    """All boxes of a step on the darkened image, the lower their scores the fainter."""
    dark, order = 0.5 * image.cpu(), step["scores"].argsort().cpu()
    colors = torch.tensor([class_color(k) for k in step["labels"].tolist()])[order]
    faint = torch.lerp(255 * dark.mean((1, 2)), colors.float(), 0.12 + 0.88 * step["scores"].cpu()[order, None])
    return draw_boxes(dark, boxes.cpu()[order], [tuple(color) for color in faint.int().tolist()], long_side=PANEL_SIDE)


def image_grid(images: Sequence[Tensor]) -> Image.Image:
    """Images of one size, float (C, H, W) in 0..1 with 1 or 3 channels, in rows; about as many rows as columns."""
    return to_pil(make_grid(list(images), math.ceil(math.sqrt(len(images))), padding=2, pad_value=1.0))


def mask_overlay(image: Tensor, labels: Tensor) -> Tensor:
    """The image (3, H, W) with the colors of its labels (H, W) laid over it: none over class 0, grey over 255."""
    image, labels = image.detach().cpu(), labels.cpu().long()
    present = [k for k in labels.unique().tolist() if k]
    if not present:
        return image
    colors = [GREY if k == IGNORE_INDEX else class_color(k) for k in present]
    return draw_segmentation_masks(image, labels == torch.tensor(present)[:, None, None], MASK_OPACITY, colors)


def uncertainty_map(uncertainty: Tensor) -> Tensor:
    """(H, W) in nats as colors (3, H, W), from black at 0 to yellow at ln 2 and above."""
    from matplotlib import colormaps

    colors = colormaps["inferno"]((uncertainty.cpu() / MAX_UNCERTAINTY).clamp(0, 1).numpy())
    return torch.from_numpy(colors[..., :3]).float().permute(2, 0, 1)


def segmentation_panels(
    image: Tensor,
    labels: Tensor,
    uncertainty: Tensor,
    classes: Sequence[str],
    truth: Tensor | None = None,
    long_side: int | None = None,
) -> Image.Image:
    """Image, true labels if given, predicted labels and their uncertainty, beside each other over the class names.

    Args:
        image: (3, H, W).
        labels, truth: (H, W), 0..K-1; truth may be 255.
        uncertainty: (H, W) in nats.
        long_side: of each in pixels; by default about that of the image.
    """
    panels = {"image": image} | ({} if truth is None else {"ground truth": mask_overlay(image, truth)})
    panels |= {"prediction": mask_overlay(image, labels), "uncertainty": uncertainty_map(uncertainty)}
    return stack([image_row(panels, long_side), legend(classes)], vertical=True)


def image_row(images: Mapping[str, Tensor], long_side: int | None = None) -> Image.Image:
    """Images (3, H, W) under their titles, beside each other."""
    return stack([titled(draw_boxes(image, torch.empty(0, 4), [], (), long_side), t) for t, image in images.items()])


def draw_matches(first: Tensor, second: Tensor, points: Tensor, found: Tensor, right: Tensor) -> Image.Image:
    """Two images (3, H, W) beside each other, a line from each point to what was found for it.

    Args:
        points, found: (N, 2) rows and columns in the first and in the second image.
        right: (N,) bool: lines are green, and red where it was not.
    """
    gap = 8
    sides = [draw_boxes(image, torch.empty(0, 4), []) for image in (first, second)]
    whole = stack(sides, gap=gap)
    draw = ImageDraw.Draw(whole)
    scales = [side.width / image.shape[2] for side, image in zip(sides, (first, second), strict=True)]
    for point, place, good in zip(points.tolist(), found.tolist(), right.tolist(), strict=True):
        start, end = (
            ((column + 0.5) * scale, (row + 0.5) * scale)
            for (row, column), scale in zip((point, place), scales, strict=True)
        )
        draw.line([start, (end[0] + sides[0].width + gap, end[1])], RIGHT if good else WRONG, 2)
    return whole


def legend(classes: Sequence[str]) -> Image.Image:
    """The names of classes over their colors."""
    colors = [class_color(k) if k else PAPER for k in range(len(classes))]
    swatches = [titled(Image.new("RGB", (90, 12), c), name) for c, name in zip(colors, classes, strict=True)]
    return contact_sheet(swatches, LEGEND_COLUMNS, gap=8)


def contact_sheet(panels: Sequence[Image.Image], columns: int = 2, gap: int = 24) -> Image.Image:
    """Panels in rows of so many."""
    rows = [stack(panels[i : i + columns], gap=gap) for i in range(0, len(panels), columns)]
    return stack(rows, vertical=True, gap=gap)


def stack(panels: Sequence[Image.Image], vertical: bool = False, gap: int = 8) -> Image.Image:
    """The panels from left to right, or from top to bottom."""
    axis = int(vertical)
    size = [max(panel.size[i] for panel in panels) for i in (0, 1)]
    size[axis] = sum(panel.size[axis] for panel in panels) + gap * (len(panels) - 1)
    whole = Image.new("RGB", (size[0], size[1]), PAPER)
    corner = [0, 0]
    for panel in panels:
        whole.paste(panel, (corner[0], corner[1]))
        corner[axis] += panel.size[axis] + gap
    return whole


def titled(panel: Image.Image, title: str) -> Image.Image:
    """The panel with a line of text above it."""
    width = max(panel.width, text_width(title, 18) + 8)
    whole = Image.new("RGB", (width, panel.height + 28), PAPER)
    whole.paste(panel, (0, 28))
    write_line(ImageDraw.Draw(whole), (4, 3), title, INK, 18)
    return whole
