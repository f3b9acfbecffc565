"""COCO detection data sets."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from diffperception.data.annotations import ADVICE, CocoTable, labels_of, read_coco, tabulate
from diffperception.data.batches import images_per_class
from diffperception.data.images import BrokenImageError, read_image, to_float
from diffperception.data.outlines import decode_outlines, outline_of
from diffperception.data.tiles import MIN_SEEN, RandomTile, Window, seen_share

Target = dict[str, Any]


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of a COCO annotation file.

    Sample i is `(image, target)`: image float32 (3, H, W), RGB, 0..1; target a dict of
    - boxes (n, 4) float32, x1 y1 x2 y2 in pixels, clipped to the image;
    - labels (n,) int64 in 0..K-1: label k is `category_ids[k]` of the file and `classes[k]` by name;
    - image_id int; iscrowd (n,) int64; area (n,) float32, the file's area in pixels of the stored image;
    - masks (n, H, W) uint8, 1 inside, where they are asked for.

    Boxes without area inside the image are left out and counted in `boxes_dropped`. Crowd regions (one box around many
    objects) stay for pictures and evaluation; `TrainingTransforms` removes them, as they must not be learned as one.

    Args:
        annotations: the COCO JSON file.
        images: the folder that the file names in it are relative to.
        transforms: called as `transforms(image, target)` with a uint8 `tv_tensors.Image` and `tv_tensors.BoundingBoxes`
            for the boxes, so torchvision's v2 transforms fit; conversion to float comes after it.
        on_broken: "stop" raises BrokenImageError on an image that is missing, unreadable or of another size than the
            file says; "skip" warns once in a process for each such image and returns the next readable sample instead.
        masks: whether targets have masks, decoded from the file's outlines when a sample is read.
        tile: of images that are larger, samples are such random windows, before the transforms; objects of which a
            window shows less than MIN_SEEN of the area are left out of the sample.
    """

    def __init__(
        self,
        annotations: str | Path,
        images: str | Path,
        transforms: Callable[[Tensor, Target], tuple[Tensor, Target]] | None = None,
        on_broken: Literal["stop", "skip"] = "stop",
        masks: bool = False,
        tile: RandomTile | None = None,
    ):
        self.annotations, self.images, self.masks = Path(annotations), Path(images), masks
        self.transforms, self.on_broken, self.tile = transforms, on_broken, tile
        content = read_coco(annotations, outlines=masks)
        table = tabulate(content, annotations)
        _require_sound(table, self.annotations)
        if not self.images.is_dir():
            raise FileNotFoundError(f"there is no image folder {images}")

        self.category_ids, self.classes = labels_of(content["categories"])
        self.image_ids: list[int] = table.image_ids.tolist()
        self.file_names = table.file_names
        self.sizes = table.sizes
        kept = self._index_boxes(table)
        self._outlines = _Outlines([content["annotations"][i] for i in kept], str(annotations)) if masks else None
        self._warned: set[int] = set()

    def _index_boxes(self, table: CocoTable) -> np.ndarray:
        """Sort the boxes by image: of image i rows offsets[i]..offsets[i+1]. Returns their rows in the file."""
        image, _ = table.rows_of_images()
        boxes = clip_boxes(table.boxes, table.sizes[image])
        kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        kept = kept[np.argsort(image[kept], kind="stable")]

        self.boxes_dropped = len(boxes) - len(kept)
        self.offsets = np.searchsorted(image[kept], np.arange(len(table.image_ids) + 1))
        self.boxes = boxes[kept]
        self.labels = np.searchsorted(self.category_ids, table.annotation_categories[kept])
        self.iscrowd = table.iscrowd[kept].astype(np.int64)
        self.areas = table.areas[kept].astype(np.float32)
        return kept

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.stored(index)
        image = to_float(image)
        return image.as_subclass(Tensor), target

    def stored(self, index: int) -> tuple[Tensor, Target]:
        """Sample `index` with its image as uint8, a quarter of the memory."""
        image, index = self._read_from(index)
        window = self._window(index)
        target = self.target(index, window)
        if window is not None:
            image = window.cut(image).contiguous()
        if self.transforms is not None:
            image, target = self.transforms(tv_tensors.Image(image), target)
        plain = {name: target[name].as_subclass(Tensor) for name in ("boxes", "masks") if name in target}
        return image, target | plain

    def _window(self, index: int) -> Window | None:
        """The part of image `index` that a sample shows; None for all of it."""
        if self.tile is None:
            return None
        rows = slice(self.offsets[index], self.offsets[index + 1])
        width, height = self.sizes[index].tolist()
        return self.tile.draw(self.boxes[rows][self.iscrowd[rows] == 0], height, width)

    def target(self, index: int, window: Window | None = None) -> Target:
        """The target of sample `index`, or of a window of it, without opening its image."""
        width, height = self.sizes[index].tolist()
        rows = np.arange(self.offsets[index], self.offsets[index + 1])
        if window is not None:
            rows = rows[seen_share(self.boxes[rows], window) >= MIN_SEEN]
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(self.boxes[rows]),
            format="XYXY",
            canvas_size=(height, width),
        )
        target = {
            "boxes": boxes if window is None else F.crop(boxes, *window.place),
            "labels": torch.from_numpy(self.labels[rows]),
            "image_id": self.image_ids[index],
            "iscrowd": torch.from_numpy(self.iscrowd[rows]),
            "area": torch.from_numpy(self.areas[rows]),
        }
        if self._outlines is not None:
            outlines = (self._outlines[row] for row in rows.tolist())
            target["masks"] = tv_tensors.Mask(decode_outlines(outlines, height, width, window))
        return target

    def labels_of_images(self) -> list[np.ndarray]:
        """The labels of each image's boxes, one for each box; crowd regions are left out, as they are not learnt."""
        learnt = np.flatnonzero(self.iscrowd == 0)
        return np.split(self.labels[learnt], np.searchsorted(learnt, self.offsets[1:-1]))

    def images_per_class(self) -> np.ndarray:
        """(K,) in how many images each class occurs."""
        return images_per_class(self.labels_of_images(), len(self.classes))

    def _read_from(self, index: int) -> tuple[Tensor, int]:
        """The image at `index` or, when broken ones are skipped, the next readable one; and its index."""
        if self.on_broken == "stop":
            return self._read(index), index
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            try:
                return self._read(candidate), candidate
            except BrokenImageError as error:
                if candidate not in self._warned:
                    self._warned.add(candidate)
                    warnings.warn(f"{error}; it is skipped", stacklevel=2)
        raise ValueError(f"no image of {self.annotations} can be read from {self.images}")

    def _read(self, index: int) -> Tensor:
        path = self.images / self.file_names[index]
        image = read_image(path)
        width, height = self.sizes[index].tolist()
        if image.shape[1:] != (height, width):
            raise BrokenImageError(
                f"the image {path} is {image.shape[2]}x{image.shape[1]} pixels, but {self.annotations} says"
                f" {width}x{height}, so its boxes would be misplaced"
            )
        return image


class _Outlines:
    """Outlines of many objects in one piece of memory, which worker processes do not copy by reading it."""

    def __init__(self, annotations: list[dict[str, Any]], source: str):
        texts = [json.dumps(outline_of(annotation, source)).encode() for annotation in annotations]
        self.ends = np.cumsum([0, *map(len, texts)])
        self.text = np.frombuffer(b"".join(texts), dtype=np.uint8)

    def __getitem__(self, row: int) -> Any:
        return json.loads(self.text[self.ends[row] : self.ends[row + 1]].tobytes())


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) x y width height -> float32 x1 y1 x2 y2 inside images of `sizes` (n, 2) width height."""
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return np.clip(corners, 0, np.tile(sizes, 2)).astype(np.float32)


def _require_sound(table: CocoTable, path: Path) -> None:
    """Raise ValueError on what would make samples wrong or ambiguous."""
    problems = (
        (len(table.image_ids) == 0, "it lists no images"),
        (len(table.category_ids) == 0, "it lists no categories"),
        (len(np.unique(table.image_ids)) < len(table.image_ids), "two images have the same id"),
        (len(np.unique(table.category_ids)) < len(table.category_ids), "two categories have the same id"),
        (not np.isin(table.annotation_images, table.image_ids).all(), "an annotation names an unknown image id"),
        (not np.isin(table.annotation_categories, table.category_ids).all(), "one names an unknown category id"),
        (not np.isfinite(table.boxes).all(), "a box holds a number that is not finite"),
    )
    for found, sentence in problems:
        if found:
            raise ValueError(f"{path} cannot be used: {sentence} ({ADVICE})")
