"""Images with a mask of labels each: what pixel classifiers learn from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffperception.data.images import LazyMap, read_image, read_size, resize_short_side, to_float
from diffperception.data.listing import list_images

IGNORE_INDEX = 255  # the label of pixels that have none
FORMATS = (".png", ".npy")  # of masks


@dataclass
class MaskDataOptions:
    """Which images and masks there are.

    Args:
        images: folder with images.
        masks: folder with their masks, of the same names: PNG of one channel or NPY, in each pixel its class's number.
        classes: names of the classes 0, 1, ...
        annotations: only the images are used that this COCO JSON file lists, or this text file with a name per line.
        max_images: use only so many of the images, chosen by the seed; null for all.
        unlabelled: what to do at an image without a mask: stop, naming it, or leave it out.
        val_images: folder with images to measure on; null for none.
        val_masks: folder with the masks of `val_images`.
        val_annotations: only those of `val_images` are used that this COCO JSON or text file lists.
        ignore: the value in masks of pixels without a label; null for none.
        mask_values: class numbers of the values in masks where they differ, such as {0: 0, 255: 1}.
        short_side: work on images resized to this short side, best that which the generator learned from; scores
            are always measured at the masks' own size. null for no resizing.
    """

    images: Path
    masks: Path
    classes: list[str]
    annotations: Path | None = None
    max_images: PositiveInt | None = None
    unlabelled: Literal["stop", "skip"] = "stop"
    val_images: Path | None = None
    val_masks: Path | None = None
    val_annotations: Path | None = None
    ignore: int | None = IGNORE_INDEX
    mask_values: dict[int, int] | None = None
    short_side: PositiveInt | None = None

    def open(self, seed: int = 0) -> "MaskFolder":
        """The images to learn from, resized."""
        return MaskFolder(self, seed)

    def resized(self, image: Tensor) -> Tensor:
        """An image (3, H, W) as it is worked on."""
        return resize_short_side(image, self.short_side)

    def open_val(self) -> "MaskFolder | None":
        """The images to measure on, at their own size."""
        if self.val_images is None or self.val_masks is None:
            if self.val_images is not self.val_masks:
                raise ValueError("give both data.val_images and data.val_masks, or neither")
            return None
        val = replace(self, images=self.val_images, masks=self.val_masks, annotations=self.val_annotations)
        return MaskFolder(replace(val, max_images=None, short_side=None))


class MaskFolder(Dataset[tuple[Tensor, Tensor]]):
    """The images of one folder with the masks of another, paired by their names without the ending.

    Sample i is (image, mask): float32 (3, h, w), RGB, 0..1, and int64 (h, w), 0..K-1 or 255. An image that lies in a
    folder within `images` has its mask in a folder of that name within `masks`. All masks are looked through at the
    beginning, and read again when they are asked for.

    Args:
        options: what there is, without `val_images`; an image resized to `short_side` is antialiased, its mask is not.
        seed: chooses `max_images` of the images; a larger number chooses the same and others.

    Attributes:
        names: the images' paths below their folder.
        images, masks: those of the samples, each read when it is asked for.

    Raises:
        FileNotFoundError: there is no such folder, no image in it, or one that is listed is missing.
        ValueError: two classes have one name or there are over 255, an image has no mask or a wrong one, or no pixel
            has a label.
    """

    def __init__(self, options: MaskDataOptions, seed: int = 0) -> None:
        self.short_side = options.short_side
        self.labels = _label_of_value(len(check_names(options.classes)), options.ignore, options.mask_values)
        images, masks = Path(options.images), Path(options.masks)
        pairs = find_pairs(images, masks, options.annotations, options.unlabelled)
        if options.max_images is not None:
            order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
            pairs = [pairs[i] for i in order[: options.max_images].tolist()]
        self.names = [str(image.relative_to(images)) for image, _ in pairs]
        labelled = [self._has_labels(*pair) for pair in pairs]
        if not any(labelled):
            raise ValueError(f"all pixels of the masks in {masks} are ignored: label some")
        self.images = LazyMap(self._image, [image for image, _ in pairs])
        self.masks = LazyMap(self._mask, [mask for _, mask in pairs])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.masks[index]

    def _image(self, path: Path) -> Tensor:
        return resize_short_side(to_float(read_image(path)), self.short_side)

    def _mask(self, path: Path) -> Tensor:
        return resize_short_side(torch.from_numpy(self._read(path))[None], self.short_side, nearest=True)[0]

    def _has_labels(self, image: Path, mask: Path) -> bool:
        """Whether any pixel of a mask is labelled; ValueError if the mask does not go with the image."""
        labels, (height, width) = self._read(mask), read_size(image)
        if labels.shape != (height, width):
            raise ValueError(
                f"the mask {mask} has {labels.shape[0]} x {labels.shape[1]} pixels, but its image {image} has"
                f" {height} x {width}: they must be alike"
            )
        return bool((labels != IGNORE_INDEX).any())

    def _read(self, path: Path) -> np.ndarray:
        """The labels in a mask's file, (H, W) int64."""
        mask = read_mask(path)
        labels = np.full(mask.shape, -1, dtype=np.int64)
        for value, label in self.labels.items():
            labels[mask == value] = label
        if unknown := np.unique(mask[labels == -1]).tolist():
            raise ValueError(
                f"the mask {path} has the unknown value{'s' * (len(unknown) > 1)} {_some(unknown)}; known are"
                f" {_some(sorted(self.labels))}: name all classes, or say with `mask_values` and `ignore` what else the"
                " masks hold"
            )
        return labels


def find_pairs(
    images: Path, masks: Path, annotations: Path | None = None, unlabelled: Literal["stop", "skip"] = "stop"
) -> list[tuple[Path, Path]]:
    """The images of a folder, or those of them that a file lists, with their masks; see :class:`MaskFolder`."""
    if not masks.is_dir():
        raise FileNotFoundError(f"there is no folder of masks {masks}")
    paths = list_images(images, annotations).paths
    if masks.resolve() != images.resolve():
        paths = [path for path in paths if masks.resolve() not in path.resolve().parents]
    found = [(path, find_mask(path.relative_to(images), masks)) for path in paths]
    pairs = [(path, mask) for path, mask in found if mask is not None]
    without = [path for path, mask in found if mask is None]
    if not pairs:
        raise ValueError(
            f"no image in {images} has a mask in {masks}: a mask has its image's name, ending in {' or '.join(FORMATS)}"
        )
    if without and unlabelled == "stop":
        others = f", nor have {len(without) - 1} others" if len(without) > 1 else ""
        raise ValueError(
            f"the image {without[0]} has no mask in {masks}{others}: add masks, list the images that have one in a file"
            " for `annotations`, or set `unlabelled` to skip"
        )
    return pairs


def find_mask(image: Path, masks: Path) -> Path | None:
    """The mask of an image whose name below its folder is given, if there is one."""
    candidates = (masks / image.with_suffix(ending) for ending in FORMATS)
    return next(filter(Path.is_file, candidates), None)


def check_names(classes: Sequence[str]) -> list[str]:
    """The names of classes; ValueError if two are alike, for scores are told by name."""
    if doubled := [name for i, name in enumerate(classes) if name in classes[:i]]:
        raise ValueError(f"two classes are named {doubled[0]}: give every class a name of its own")
    return list(classes)


def read_mask(path: Path) -> np.ndarray:
    """The numbers in a mask's file, (H, W), of a PNG with a palette the places in it; ValueError for no mask."""
    try:
        if path.suffix == ".npy":
            mask = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as picture:
                mask = np.asarray(picture)
    except Exception as error:  # Pillow and numpy raise many kinds on bad bytes
        raise ValueError(f"the mask {path} cannot be read: {error}") from None
    if mask.ndim != 2 or mask.dtype.kind not in "buif":
        raise ValueError(
            f"the mask {path} has numbers of shape {mask.shape}: a mask has one channel, a class's number in each pixel"
        )
    if mask.dtype.kind == "f" and not np.equal(mask, np.round(mask)).all():
        raise ValueError(f"the mask {path} has numbers that are not whole: a mask holds the numbers of classes")
    return mask


def _label_of_value(num_classes: int, ignore: int | None, values: Mapping[int, int] | None) -> dict[int, int]:
    """The label of each value that masks may hold; ValueError if `mask_values` leads to another than a class."""
    if num_classes > IGNORE_INDEX:
        raise ValueError(f"there are {num_classes} classes, but masks of labels hold at most {IGNORE_INDEX}: join some")
    ignored = {} if ignore is None else {ignore: IGNORE_INDEX}
    if values is None:
        return {k: k for k in range(num_classes)} | ignored
    if outside := sorted({*values.values()} - {*range(num_classes), IGNORE_INDEX}):
        raise ValueError(f"`mask_values` leads to {_some(outside)}, but the classes are 0 to {num_classes - 1}")
    return ignored | dict(values)


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
