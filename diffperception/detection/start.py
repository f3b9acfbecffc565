"""Boxes that prediction starts from in place of pure noise: checked, read from results files, in diffusion space."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from diffperception.data.annotations import CocoTable
from diffperception.detection.boxes import encode_boxes
from diffperception.detection.results import IMAGES, read_described, read_results
from diffperception.devices import to_device

StartBoxes: TypeAlias = Sequence[Tensor | None]  # (n, 4) xyxy pixels of each image; None or no boxes for pure noise
OUTSIDE = 1.0  # pixels by which a box may reach beyond its image, as rounding makes them; it is clipped


@dataclass
class Start:
    """Clean boxes (B, N, 4) in diffusion space, and which of them there are (B, N): the others start from noise."""

    boxes: Tensor
    given: Tensor


def encode_start(start: StartBoxes, sizes: Tensor, num_boxes: int, signal_scale: float) -> Start:
    """The boxes given for a batch of images, padded to N.

    Args:
        start: in pixels of the images.
        sizes: (B, 4) width, height, width, height of the images.
        num_boxes: N.
        signal_scale: size of the signal beside the unit noise.

    Raises:
        ValueError: there are not as many as images, more than N of an image, or not such boxes.
    """
    if len(start) != len(sizes):
        raise ValueError(
            f"start has boxes of {len(start)} images, but there are {len(sizes)}: give one entry per image"
        )
    rows = []
    for number, (boxes, size) in enumerate(zip(start, sizes.cpu(), strict=True)):
        checked = require_boxes(torch.empty(0, 4) if boxes is None else boxes, size, f"start of image {number}")
        if len(checked) > num_boxes:
            raise ValueError(
                f"start of image {number} has {len(checked)} boxes, more than num_boxes, {num_boxes}: give the best of"
                " them, or raise num_boxes"
            )
        rows.append(checked)
    counts = torch.tensor([len(boxes) for boxes in rows])
    given = torch.arange(num_boxes) < counts[:, None]
    padded = torch.stack([F.pad(boxes, (0, 0, 0, num_boxes - len(boxes))) for boxes in rows])
    boxes, given = to_device(padded, sizes.device), to_device(given, sizes.device)
    return Start(encode_boxes(boxes, sizes, signal_scale), given)


def require_boxes(boxes: Tensor, size: Tensor, what: str) -> Tensor:
    """The boxes (n, 4), float32 on the CPU, clipped to an image of this size (4,): width, height, width, height.

    ValueError if they are not xyxy boxes in pixels of the image; it begins with what they are.
    """
    found = torch.as_tensor(boxes, dtype=torch.float32, device="cpu")
    found = found.reshape(-1, 4) if not found.numel() else found
    if found.dim() != 2 or found.shape[1] != 4:
        raise ValueError(f"{what} has the shape {tuple(found.shape)}: it must be (n, 4), xyxy in pixels")
    sound = found.isfinite().all(1) & (found[:, 2:] >= found[:, :2]).all(1)
    sound &= ((found >= -OUTSIDE) & (found <= size + OUTSIDE)).all(1)
    if not sound.all():
        wrong = ", ".join(f"{value:.6g}" for value in found[~sound][0].tolist())
        width, height = size[:2].int().tolist()
        raise ValueError(f"{what} has a box [{wrong}] that is no xyxy box in the {width}x{height} pixels of the image")
    return torch.minimum(found.clamp(min=0), size)


def read_start(path: str | Path, table: CocoTable | None = None) -> dict[int | str, Tensor]:
    """The boxes of a COCO results file, xyxy in pixels of their image, the best first: by image.

    Args:
        path: the file, such as `predict` writes.
        table: of the annotation file whose image ids are the keys. Without, they are names of files, as in the
            images.json that `predict` has left beside the results.

    Raises:
        FileNotFoundError, ValueError: as `read_results`; nothing says which image an id means; a box is outside of its.
    """
    described = read_described(Path(path))
    if table is None and described is None:
        raise ValueError(
            f"there is no {IMAGES} of `predict` beside {path} that says which images its ids mean: name the annotations"
            " that they are of (--annotations)"
        )
    known = described[0] if table is None and described is not None else table
    assert known is not None
    rows: dict[int, list[list[float]]] = {}
    for row in sorted(read_results(path, known).rows, key=lambda row: -row["score"]):
        rows.setdefault(row["image_id"], []).append(row["bbox"])
    found: dict[int | str, Tensor] = {}
    for image_id, name, (width, height) in zip(known.image_ids.tolist(), known.file_names, known.sizes, strict=True):
        if image_id in rows:
            boxes = box_convert(torch.tensor(rows[image_id], dtype=torch.float64), "xywh", "xyxy")
            size = torch.tensor([width, height] * 2 if width and height else [torch.inf] * 4, dtype=torch.float32)
            found[name if table is None else image_id] = require_boxes(boxes, size, f"{path}: image {image_id}")
    return found


def best_boxes(start: Mapping[int | str, Tensor], images: Sequence[int | str], count: int) -> list[Tensor]:
    """Of each of the images the first `count` boxes, or none."""
    return [start[image][:count] if image in start else torch.empty(0, 4) for image in images]
