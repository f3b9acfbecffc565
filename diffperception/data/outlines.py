"""Outlines of objects as COCO files have them, polygons or run lengths, and the masks that they stand for."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from diffperception.data.tiles import Window

RunLengths = dict[str, Any]  # `size`, height and width, and `counts`, COCO's compressed text


def outline_of(annotation: dict[str, Any], source: str) -> Any:
    """An annotation's outline; ValueError, naming the file, if it has none."""
    outline = annotation.get("segmentation")
    if outline:
        return outline
    raise ValueError(
        f"annotation {annotation.get('id')} of {source} has no segmentation: masks need one of every object, so do"
        " without masks, or add it"
    )


def decode_outlines(outlines: Iterable[Any], height: int, width: int, window: Window | None = None) -> Tensor:
    """Masks (n, height, width), uint8, 1 inside; or the parts of them that a window shows, which alone are kept."""
    left, top, right, bottom = window or Window(0, 0, width, height)
    masks = [coco_mask.decode(run_lengths(o, height, width))[top:bottom, left:right].copy() for o in outlines]
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, bottom - top, right - left, dtype=torch.uint8)


def run_lengths(outline: Any, height: int, width: int) -> RunLengths:
    """An outline as run lengths; the parts of an object in several polygons are one."""
    if isinstance(outline, dict) and not isinstance(outline["counts"], list):
        return outline
    encoded = coco_mask.frPyObjects(outline, height, width)
    return coco_mask.merge(encoded) if isinstance(encoded, list) else encoded


def encode_masks(masks: Tensor) -> list[RunLengths]:
    """Masks (n, H, W), bool or 0..1, as JSON can hold them."""
    inside = (masks > 0.5).cpu().numpy().astype(np.uint8)
    encoded = [coco_mask.encode(np.asfortranarray(mask)) for mask in inside]
    return [{"size": list(code["size"]), "counts": code["counts"].decode()} for code in encoded]
