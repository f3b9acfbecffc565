"""Folders of images: what generators learn from, and classifiers of whole images."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from diffperception.data.captions import read_captions, require_sides_kept
from diffperception.data.images import BrokenImageError, is_deep_grey, read_image, read_size, to_float
from diffperception.data.listing import Listing, list_images
from diffperception.data.split import part_of


@dataclass
class ImageDataOptions:
    """Which images the generator learns from.

    Args:
        images: folder with images, in folders of their classes if `labelled`; or an image, a pattern or a list of them.
        annotations: COCO JSON file; only the images it lists are used.
        captions: COCO JSON file of captions of the images, of which one is learned at a time; only the images with
            captions are used.
        val_images: folder with images to measure the loss on during training; null for none.
        val_annotations: COCO JSON file with the images to use of `val_images`.
        val_captions: COCO JSON file of captions of `val_images`.
        val_share: instead of `val_images`, this share of the images is held out to measure the loss on, such as 0.1.
        split_seed: chooses them, with their names: images that are added move few others.
        short_side: images are first resized to this short side, then a random part is cut out; null resizes them
            until they are as small as holds the part.
        labelled: the folders in `images` are the classes; the model must have as many.
        horizontal_flip: probability that an image is mirrored left to right.
        vertical_flip: probability that an image is mirrored top to bottom; for scenes without an up and a down.
        batch_size: images in a training batch, for each process.
        workers: processes that read images, for each process that trains.
        on_broken: what to do at an image that cannot be read or is too small: stop, naming it, or take the next one.
        cached: how many images each worker keeps in memory, resized.
    """

    images: Path
    annotations: Path | None = None
    captions: Path | None = None
    val_images: Path | None = None
    val_annotations: Path | None = None
    val_captions: Path | None = None
    val_share: float | None = None
    split_seed: NonNegativeInt = 0
    short_side: PositiveInt | None = None
    labelled: bool = False
    horizontal_flip: ClosedUnitInterval = 0.5
    vertical_flip: ClosedUnitInterval = 0.0
    batch_size: PositiveInt = 32
    workers: NonNegativeInt = 2
    on_broken: Literal["stop", "skip"] = "stop"
    cached: NonNegativeInt = 0

    def classes(self) -> list[str] | None:
        """The names of the classes; None without labels."""
        return class_folders(Path(self.images)) if self.labelled else None

    def of_val(self, images: Path) -> "ImageDataOptions":
        """These options, of the images to measure on; ValueError if they lack the captions that those to learn have."""
        if (self.captions is None) != (self.val_captions is None):
            lacking, given = ("val_captions", "captions") if self.val_captions is None else ("captions", "val_captions")
            raise ValueError(f"data.{given} is given without data.{lacking}: name the captions of both, or of none")
        return replace(self, images=images, annotations=self.val_annotations, captions=self.val_captions)

    def listing(self) -> Listing:
        """The images to learn from; errors as for :func:`list_images`."""
        return list_images(self.images, self.captions if self.annotations is None else self.annotations)

    def open(self, image_size: tuple[int, int], channels: int) -> "tuple[ImageFolder, ImageFolder | None]":
        """The images to learn from, and those to measure on; ValueError if their folders are of other classes."""
        if self.val_share is not None:
            if self.val_images is not None:
                raise ValueError("give either data.val_images or data.val_share, which holds images out of data.images")
            return ImageFolder(self, image_size, channels, False), ImageFolder(self, image_size, channels, True)
        train = ImageFolder(self, image_size, channels)
        if self.val_images is None:
            return train, None
        val = ImageFolder(self.of_val(self.val_images), image_size, channels)
        if val.classes != train.classes:
            raise ValueError(
                f"{self.images} and {self.val_images} hold folders of different names: they are the classes, so give"
                " both the same"
            )
        return train, val


class ImageFolder(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Random crops of the images in a folder.

    Sample i is (image, target): float32 (C, height, width), 0..1; ``label`` (its folder's place among the classes, or
    None), ``image_id``, ``path`` and, where there are captions, one of the image's as ``caption``. All draws come from
    torch's global generator (see `SeededSamples`).

    Args:
        options: which images there are, without `val_images`; `on_broken` is also for those less than half a crop high
            or wide.
        image_size: height and width of the crops.
        channels: 3 (RGB) or 1 (grey).
        held_out: the part of the images that `val_share` holds out (true), or the others (false); null for all.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image is broken, or smaller than a crop.
    """

    def __init__(
        self,
        options: ImageDataOptions,
        image_size: tuple[int, int],
        channels: int = 3,
        held_out: bool | None = None,
    ):
        if options.short_side is not None and options.short_side < max(image_size):
            raise ValueError(
                f"data.short_side is {options.short_side}, but crops of {image_size[0]} x {image_size[1]} pixels are"
                f" wanted: make it at least {max(image_size)}"
            )
        require_image_channels(channels)
        self.options, self.image_size, self.channels = options, image_size, channels
        self.root, found, self.remark = options.listing()
        said: dict[Path, list[str]] = {}
        if options.captions is not None:
            captions = read_captions(options.captions)
            require_sides_kept(captions, options.horizontal_flip, options.vertical_flip)
            said = captions.of_paths(found, options.images)
            silent, found = len(found) - len(said), list(said)
            left = f"{silent} images of {options.images} have no caption and are left out" if silent else ""
            self.remark = "; ".join(filter(None, [self.remark, left]))
        if held_out is not None and options.val_share is not None:
            found = part_of(found, self.root, options.val_share, options.split_seed, held_out)
        self.paths = self._usable(found)
        self.captions = [said[path] for path in self.paths] if said else None
        self.skipped = len(found) - len(self.paths)
        self.classes = options.classes()
        if self.classes and any(path.parent == self.root for path in self.paths):
            raise ValueError(f"{options.images} holds images outside of any class: give each class a folder of its own")
        flips = v2.RandomHorizontalFlip(options.horizontal_flip), v2.RandomVerticalFlip(options.vertical_flip)
        self.flips = v2.Compose(flips)
        self._kept: dict[int, Tensor] = {}

    def _usable(self, paths: list[Path]) -> list[Path]:
        """The images that can be read and are large enough; ValueError for others unless they are passed over."""
        sizes = {}
        for path in paths:
            try:
                size = read_size(path)
                if is_deep_grey(path):
                    read_image(path)
                sizes[path] = size
            except BrokenImageError as error:
                if self.options.on_broken == "stop":
                    raise _advised(error) from error
        small = {path: size for path, size in sizes.items() if is_too_small(size, self.image_size)}
        if small and self.options.on_broken == "stop":
            first, (height, width) = next(iter(small.items()))
            raise ValueError(
                f"{first} has {height} x {width} pixels, less than half of the {self.image_size[0]} x"
                f" {self.image_size[1]} wanted{f', and so have {len(small) - 1} others' if len(small) > 1 else ''}:"
                " remove what is so small, pass over it with data.on_broken skip, or learn smaller images"
            )
        usable = [path for path in sizes if path not in small]
        if not usable:
            raise FileNotFoundError(f"there is no image large enough that can be read in {self.options.images}")
        return usable

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        index, whole = self._readable(index)
        path = self.paths[index]
        image = to_float(self.flips(self._crop(whole)))
        label = None if self.classes is None else self.classes.index(path.relative_to(self.root).parts[0])
        target = {"label": label, "image_id": index, "path": str(path)}
        if self.captions is not None:
            captions = self.captions[index]
            target["caption"] = captions[int(torch.randint(len(captions), ()))]
        return image, target

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """The image at `index`, or the next that can be read where broken ones are passed over."""
        for candidate in range(index, index + (len(self) if self.options.on_broken == "skip" else 1)):
            try:
                return candidate % len(self), self._image(candidate % len(self))
            except BrokenImageError as error:
                broken = error
        raise _advised(broken) from broken

    def _image(self, index: int) -> Tensor:
        image = self._kept[index] if index in self._kept else self._read(index)
        if len(self._kept) < self.options.cached:
            self._kept[index] = image
        return image

    def _read(self, index: int) -> Tensor:
        """An image, uint8 (C, H, W), resized so that a crop fits in it."""
        image = read_image(self.paths[index])
        if self.channels == 1:
            image = F.rgb_to_grayscale(image)
        return resized_to_hold(image, self.image_size, self.options.short_side)

    def _crop(self, image: Tensor) -> Tensor:
        slack = [have - want for have, want in zip(image.shape[-2:], self.image_size, strict=True)]
        top, left = (int(torch.randint(0, room + 1, ())) for room in slack)
        return F.crop(image, top, left, *self.image_size)


def _advised(error: BrokenImageError) -> BrokenImageError:
    return BrokenImageError(f"{error}: remove it, or pass over such images with data.on_broken skip")


def resized_to_hold(image: Tensor, size: tuple[int, int], short_side: int | None = None) -> Tensor:
    """An image (C, H, W) resized, with antialiasing, to a short side, but no smaller than holds a crop of this size.

    Without a short side it becomes as small as holds one.
    """
    height, width = image.shape[-2:]
    fit = max(size[0] / height, size[1] / width)
    factor = fit if short_side is None else max(fit, short_side / min(height, width))
    if factor == 1:
        return image
    return F.resize(image, [round(height * factor), round(width * factor)], antialias=True)


def is_too_small(size: tuple[int, int], image_size: tuple[int, int]) -> bool:
    """Whether an image, of this height and width, would be enlarged to more than twice its size."""
    return any(side < wanted // 2 for side, wanted in zip(size, image_size, strict=True))


def require_image_channels(channels: int) -> None:
    """ValueError for channels that no image file has."""
    if channels not in (1, 3):
        raise ValueError(
            f"images have 3 channels, or 1 in grey, but the model has {channels}: set its in_channels to 3 or 1"
        )


def class_folders(folder: Path) -> list[str]:
    """The names of the folders with images in a folder, which are their classes; ValueError for none."""
    root, paths, _ = list_images(folder)
    names = {path.relative_to(root).parts[0] for path in paths if path.parent != root}
    if not names:
        raise ValueError(f"{folder} holds no folders of images: labelled ones are in folders of their classes")
    return sorted(names)
