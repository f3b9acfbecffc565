"""Outlines of objects as COCO files have them, polygons or run lengths, and the masks that they stand for."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from diffperception.data.entries import finite_number, whole_number
from diffperception.data.tiles import Window

RunLengths = dict[str, Any]  # `size`, height and width, and `counts`, COCO's compressed text


class Outlines:
    """Outlines of many objects in one piece of memory, which worker processes do not copy by reading it.

    Args:
        outlines: as files have them; None or empty for an object without one.

    Attributes:
        absent: (n,) bool, which objects have none.
        sizes: (n, 2) int64, height and width of run lengths; -1 for polygons, which have none.
    """

    def __init__(self, outlines: Sequence[Any]):
        texts = [json.dumps(outline).encode() for outline in outlines]
        self.ends = np.cumsum([0, *map(len, texts)])
        self.text = np.frombuffer(b"".join(texts), dtype=np.uint8)
        self.absent = np.array([not outline for outline in outlines], dtype=bool)
        sizes = [outline["size"] if isinstance(outline, dict) and outline else (-1, -1) for outline in outlines]
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)

    def of(self, rows: Iterable[int]) -> list[Any]:
        """The outlines of these objects."""
        return [json.loads(self.text[self.ends[row] : self.ends[row + 1]].tobytes()) for row in rows]


def outline(value: Any) -> Any:
    """An outline as files have them, or nothing; ValueError or TypeError if it is no outline."""
    if isinstance(value, dict) and value:
        height, width = map(whole_number, value["size"])
        if isinstance(value["counts"], list) and sum(map(whole_number, value["counts"])) != height * width:
            raise ValueError(f"the run lengths do not fill {width}x{height} pixels")
        try:
            coco_mask.decode(run_lengths(value, height, width))
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    elif isinstance(value, list):
        if any(len(polygon) < 6 or len(polygon) % 2 or not [finite_number(x) for x in polygon] for polygon in value):
            raise ValueError("a polygon has less than three points, or an x without a y")
    elif value:
        raise ValueError(f"{value!r} is no outline")
    return value


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
