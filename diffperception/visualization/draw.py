"""Detections drawn on images (3, H, W), RGB, float32 in 0..1 or uint8, with boxes as xyxy in their pixels."""

import colorsys
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from diffperception.files import written_beside
from diffperception.visualization.fonts import text_width, write_line

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

MIN_SIDE, MAX_SIDE = 480, 1600  # of the long side in pixels: text is legible, files stay small
THRESHOLD = 0.4  # detections with lower scores are not drawn
MASK_OPACITY = 0.55
INK: Color = (25, 25, 25)
PAPER: Color = (255, 255, 255)


def save_png(picture: Image.Image, path: str | Path) -> None:
    """Write a PNG file so that there is never half of it."""
    with written_beside(Path(path)) as part:
        picture.save(part, format="png")


def save_gif(pictures: Iterable[Image.Image], path: str | Path, seconds: float = 0.1) -> None:
    """Write pictures, each shown for so long, as an animated GIF without end, so that there is never half of it."""
    first, *others = pictures
    with written_beside(Path(path)) as part:
        first.save(part, format="gif", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)


def class_color(k: int) -> Color:
    """A color for class k: hues by the golden ratio, far apart for neighbours, none of them red."""
    hue = 0.10 + 0.82 * ((0.55 + k * 0.61803398875) % 1)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, (1.0, 0.8)[k // 8 % 2])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Tensor,
    detections: Mapping[str, Any],
    classes: Sequence[str],
    threshold: float = THRESHOLD,
    long_side: int | None = None,
) -> Image.Image:
    """The image with its boxes, class names and, for predictions, scores.

    Args:
        image: (3, H, W).
        detections: `boxes` (n, 4), `labels` (n,); `scores` (n,) for predictions but not for ground truth; `masks`
            (n, H, W), bool, where there are some.
        threshold: predictions with lower scores are left out.
        long_side: as in `draw_boxes`.
    """
    shown = best_last(detections, threshold)
    colors = [class_color(k) for k in shown["labels"].tolist()]
    return draw_boxes(image, shown["boxes"], colors, captions(shown, classes), long_side, shown.get("masks"))


def best_last(detections: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """The detections with at least this score, the best last; all of them where there are no scores."""
    shown = {name: detections[name].cpu() for name in ("boxes", "scores", "labels", "masks") if name in detections}
    order = torch.arange(len(shown["labels"]))
    if "scores" in shown:
        order = shown["scores"].argsort()
        order = order[shown["scores"][order] >= threshold]
    return {name: values[order] for name, values in shown.items()}


def captions(detections: Mapping[str, Any], classes: Sequence[str]) -> list[str]:
    """The class and, if there is one, the score of each detection."""
    names = [classes[k] for k in detections["labels"].tolist()]
    if "scores" not in detections:
        return names
    return [f"{name} {score:.2f}" for name, score in zip(names, detections["scores"].tolist(), strict=True)]


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    colors: Sequence[Color],
    texts: Sequence[str] = (),
    long_side: int | None = None,
    masks: Tensor | None = None,
) -> Image.Image:
    """The image with boxes, and texts above them all.

    Args:
        image: (3, H, W).
        boxes: (n, 4), the most important last.
        colors: of the boxes, their texts and masks.
        texts: beside the boxes; none by default.
        long_side: in pixels; by default small images are enlarged by a whole factor, and large ones are made smaller.
        masks: (n, H, W), bool or 0..1; where some overlap, the last is seen.
    """
    pixels = to_uint8(image)
    if masks is not None and len(masks):
        inside = (masks.cpu() > 0.5).int()
        above = inside.flip(0).cumsum(0).flip(0) - inside  # torchvision would blacken what several masks share
        pixels = draw_segmentation_masks(pixels, (inside > 0) & (above == 0), MASK_OPACITY, list(colors))
    height, width = pixels.shape[-2:]
    long = max(height, width)
    factor = (long_side or min(long * math.ceil(MIN_SIDE / long), MAX_SIDE)) / long
    size = [max(1, round(height * factor)), max(1, round(width * factor))]
    pixels = F.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)
    corners = (boxes.cpu().float() * factor).round()
    if len(corners):
        corners[:, 2:] = torch.maximum(corners[:, :2], corners[:, 2:])
        pixels = draw_bounding_boxes(pixels, corners, colors=list(colors), width=max(2, round(max(size) / 320)))
    picture = F.to_pil_image(pixels)
    _write_texts(picture, corners.tolist(), colors, texts)
    return picture


def to_uint8(image: Tensor) -> Tensor:
    """Float 0..1, or uint8, on any device -> uint8 on the CPU."""
    if image.dtype == torch.uint8:
        return image.cpu()
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().byte()


def to_pil(image: Tensor) -> Image.Image:
    """Float (3, H, W) in 0..1 -> PIL image."""
    return F.to_pil_image(to_uint8(image))


def _write_texts(picture: Image.Image, boxes: Sequence[Any], colors: Sequence[Color], texts: Sequence[str]) -> None:
    draw = ImageDraw.Draw(picture, "RGBA")
    taken: list[Box] = []
    for text, box, color in reversed(list(zip(texts, boxes, colors, strict=False))):  # the best chooses its place first
        width = text_width(text, 14) + 6
        place = _place(box, width, 18, picture.size, taken)
        taken.append(place)
        draw.rectangle(place, fill=(*color, 225))
        is_bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
        write_line(draw, (place[0] + 3, place[1]), text, INK if is_bright else PAPER, 14)


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
