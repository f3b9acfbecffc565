"""Outlines of single objects from their boxes and from masks that only say where some object is."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert

from diffperception.data.annotations import CocoTable
from diffperception.data.masks import read_mask
from diffperception.data.outlines import encode_masks
from diffperception.data.pairing import find_pairs, require_pairs


def outline_boxes(
    content: dict[str, Any], table: CocoTable, images: Path, masks: Path, classes: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """A COCO file's objects of some classes, each with what masks show in its box; and what is to be said of it.

    A pixel in several boxes is of the one whose centre is nearest, in units of its sides.

    Args:
        content: of the file, and its `table`.
        images: the folder of its images.
        masks: a folder with a mask of each, by the names that `train --task segmentation` looks for: 0 where there is
            none of these objects.
        classes: names of those whose objects the masks show; others are left out.

    Raises:
        ValueError: there is no such class, or an image has no mask or one of another size.
    """
    label_ids, names = table.labels()
    if unknown := [name for name in classes if name not in names]:
        raise ValueError(f"{table.source} has no class {unknown[0]!r}: its classes are {', '.join(names)}")
    wanted = [number for number, name in zip(label_ids, names, strict=True) if name in classes]
    pairing = find_pairs([images / name for name in table.file_names], images, masks)
    require_pairs(pairing, images, masks, whole=False)
    chosen = np.isin(table.annotation_categories, wanted)
    image, _ = table.rows_of_images
    objects, counts = [], Counter({"objects of other classes are left out": int((~chosen).sum())})
    for number, (_, path) in enumerate(pairing.pairs):
        inside, rows = _inside(path, *table.sizes[number].tolist()), np.flatnonzero(chosen & (image == number))
        parts = share_out(inside, box_convert(torch.from_numpy(table.boxes[rows]), "xywh", "xyxy"))
        for row, part, outline in zip(rows.tolist(), parts, encode_masks(parts), strict=True):
            objects.append(content["annotations"][row] | {"segmentation": outline, "area": int(part.sum())})
        empty = ~parts.any((1, 2)) if len(parts) else torch.zeros(0)
        counts["objects have nothing of a mask in their box"] += int(empty.sum())
        counts["images have a mask beyond these boxes, which is left out"] += bool((inside & ~parts.any(0)).any())
    categories = [entry for entry in content["categories"] if entry["name"] in classes]
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    return content | {"annotations": objects, "categories": categories}, notes


def _inside(path: Path, width: int, height: int) -> Tensor:
    """(H, W) bool, where a mask is not 0; ValueError if it is no mask of an image of this size."""
    inside = torch.from_numpy(read_mask(path) > 0)
    if inside.shape != (height, width):
        found = "x".join(map(str, reversed(inside.shape)))
        raise ValueError(f"the mask {path} is {found} pixels, but its image {width}x{height}")
    return inside


def share_out(inside: Tensor, boxes: Tensor) -> Tensor:
    """What boxes (n, 4; xyxy in pixels) have of a mask (H, W), (n, H, W) bool: each pixel is of one box at most."""
    height, width = inside.shape
    if not len(boxes):
        return torch.zeros(0, height, width, dtype=torch.bool)
    x, y = torch.arange(width) + 0.5, (torch.arange(height) + 0.5)[:, None]
    x1, y1, x2, y2 = boxes.float().T[..., None, None]
    # From 0 at a box's centre to 1 at its border, as far as the farther of the two axes says.
    across = ((2 * x - x1 - x2) / (x2 - x1).clamp(min=1e-6)).abs()
    along = ((2 * y - y1 - y2) / (y2 - y1).clamp(min=1e-6)).abs()
    away = torch.maximum(across, along)
    return inside & (torch.arange(len(boxes))[:, None, None] == away.argmin(0)) & (away < 1)
