"""COCO detection data sets."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from diffperception.data.annotations import CocoTable, require_same_classes, tabulate
from diffperception.data.batches import images_per_class
from diffperception.data.check_report import Problem
from diffperception.data.formats import Annotations, Format, open_annotations
from diffperception.data.images import BrokenImageError, read_image, to_float
from diffperception.data.outlines import decode_outlines
from diffperception.data.soundness import check_ids, check_learning, clip_boxes, require_entries, with_sizes
from diffperception.data.tiles import MIN_SEEN, RandomTile, Window, seen_share

Target = dict[str, Any]


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images and boxes of a COCO annotation file, or of what is read as one.

    Sample i is `(image, target)`: image float32 (3, H, W), RGB, 0..1; target a dict of
    - boxes (n, 4) float32, x1 y1 x2 y2 in pixels, clipped to the image;
    - labels (n,) int64 in 0..K-1: label k is `category_ids[k]` of the file and `classes[k]` by name;
    - image_id int; iscrowd (n,) int64; area (n,) float32, the file's area in pixels of the stored image;
    - masks (n, H, W) uint8, 1 inside, where they are asked for.

    Boxes without area inside the image are left out and counted in `boxes_dropped`. Crowd regions (one box around many
    objects) stay for pictures and evaluation; `TrainingTransforms` removes them, as they must not be learned as one.

    Args:
        annotations: the COCO JSON file, or what `format` says; or what :func:`open_annotations` gave.
        images: the folder that the file names in it are relative to; by default where the format has it.
        transforms: called as `transforms(image, target)` with a uint8 `tv_tensors.Image` and `tv_tensors.BoundingBoxes`
            for the boxes, so torchvision's v2 transforms fit; conversion to float comes after it.
        on_broken: "stop" raises BrokenImageError on an image that is missing, unreadable or of another size than the
            file says; "skip" warns once in a process for each such image and returns the next readable sample instead.
        masks: whether targets have masks, decoded from the file's outlines when a sample is read.
        tile: of images that are larger, samples are such random windows, before the transforms; objects of which a
            window shows less than MIN_SEEN of the area are left out of the sample.
        format: of the annotations, see :func:`open_annotations`.

    Attributes:
        notes: sentences on what reading the format passed over.
        table: the checked content of the file; None in a worker process.
        problems: what hinders or changes learning from the file, a sentence each as message.

    Raises:
        FileNotFoundError: the file or the folder is missing.
        ValueError: the file has an entry that cannot be used, or entries that do not fit one another.
    """

    def __init__(
        self,
        annotations: str | Path | Annotations,
        images: str | Path | None = None,
        transforms: Callable[[Tensor, Target], tuple[Tensor, Target]] | None = None,
        on_broken: Literal["stop", "skip"] = "stop",
        masks: bool = False,
        tile: RandomTile | None = None,
        format: Format = "coco",
    ):
        if not isinstance(annotations, Annotations):
            annotations = open_annotations(annotations, images, format, masks)
        self.annotations, self.images, self.masks = Path(annotations.source), annotations.images, masks
        self.notes = annotations.notes
        self.transforms, self.on_broken, self.tile = transforms, on_broken, tile
        table = tabulate(annotations.content, annotations.source, masks)
        require_entries(table)
        if not self.images.is_dir():
            raise FileNotFoundError(f"there is no image folder {self.images}")
        table = with_sizes(table, self.images)

        self.table: CocoTable | None = table
        self.category_ids, self.classes = table.labels()
        self.image_ids: list[int] = table.image_ids.tolist()
        self.file_names = table.file_names
        self.sizes = table.sizes
        self._index_boxes(table)
        problems = [*check_ids(table), *self._learning_problems(table)]
        self.problems = [replace(problem, message=problem.sentence(), places=[]) for problem in problems]
        self._warned: set[int] = set()

    def _learning_problems(self, table: CocoTable) -> list[Problem]:
        largest_scale = getattr(self.transforms, "largest_scale", None)
        seen = table.sizes if self.tile is None else np.minimum(table.sizes, self.tile.side)
        return check_learning(table, scale=largest_scale(seen) if largest_scale else None)

    def _index_boxes(self, table: CocoTable) -> None:
        """Sort the boxes by image: of image i rows offsets[i]..offsets[i+1]."""
        image, _ = table.rows_of_images
        boxes = clip_boxes(table.boxes, table.sizes[image])
        kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
        kept = kept[np.argsort(image[kept], kind="stable")]

        self.boxes_dropped = len(boxes) - len(kept)
        self.offsets = np.searchsorted(image[kept], np.arange(len(table.image_ids) + 1))
        self.boxes = boxes[kept]
        self.labels = np.searchsorted(self.category_ids, table.annotation_categories[kept])
        self.iscrowd = table.iscrowd[kept].astype(np.int64)
        self.areas = table.areas[kept].astype(np.float32)
        self._outlines = table.require_outlines(kept, image[kept]) if self.masks else None
        self._rows = kept if self.masks else None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"table": None}  # which worker processes do not need

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
        if self._outlines is not None and self._rows is not None:
            outlines = self._outlines.of(self._rows[rows])
            target["masks"] = tv_tensors.Mask(decode_outlines(outlines, height, width, window))
        return target

    def labels_of_images(self) -> list[np.ndarray]:
        """The labels of each image's boxes, one for each box; crowd regions are left out, as they are not learnt."""
        learnt = np.flatnonzero(self.iscrowd == 0)
        return np.split(self.labels[learnt], np.searchsorted(learnt, self.offsets[1:-1]))

    def order_classes(self, classes: Sequence[str], owner: str | Path = "the model") -> None:
        """Let label k be `classes[k]` of their owner, whatever the file's ids; ValueError if the file has others."""
        require_same_classes(classes, self.classes, self.annotations, owner)
        new_label = np.array([list(classes).index(name) for name in self.classes])
        self.labels = new_label[self.labels]
        self.category_ids = [self.category_ids[old] for old in np.argsort(new_label)]
        self.classes = list(classes)

    def require_files(self) -> list[str]:
        """What is to be said of image files that are not there, if broken images are skipped; does not open them.

        Raises:
            FileNotFoundError: some are missing and broken images are not skipped, or all are.
        """
        missing = [path for name in self.file_names if not (path := self.images / name).is_file()]
        if not missing:
            return []
        number = f"all {len(self)}" if len(missing) == len(self) else f"{len(missing)} of the {len(self)}"
        found = f"{number} images of {self.annotations} are missing, first {missing[0]}"
        if self.on_broken == "stop" or len(missing) == len(self):
            raise FileNotFoundError(f"{found}: is {self.images} their folder?")
        return [f"{found}: they are skipped"]

    def objects_per_image(self) -> np.ndarray:
        """(I,) how many objects each image has, crowd regions apart."""
        return np.array([len(labels) for labels in self.labels_of_images()])

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
