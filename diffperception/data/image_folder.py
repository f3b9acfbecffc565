"""Folders of images: what generators learn from, and classifiers of whole images."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from diffperception.data.images import BrokenImageError, listed_images, read_image, read_size, to_float
from diffperception.files import images_below


class ImageFolder(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Random crops of the images in a folder.

    Sample i is (image, target): float32 (C, height, width), 0..1; ``label`` (its folder's place among the classes, or
    None), ``image_id`` and ``path``. All draws come from torch's global generator (see `SeededSamples`).

    Args:
        folder: searched with all folders in it.
        image_size: height and width of the crops.
        short_side: images are first resized to this short side; by default as small as holds a crop.
        annotations: only the images are used that this COCO JSON file lists, or this text file, with a name per line.
        labelled: the folders directly in `folder` are classes.
        channels: 3 (RGB) or 1 (grey).
        horizontal_flip, vertical_flip: probabilities that a crop is mirrored.
        on_broken: what to do at an image that cannot be read, or is less than half a crop high or wide: stop, or
            pass over it.
        cached: how many images are kept decoded in memory.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an image is broken, or smaller than a crop.
    """

    def __init__(
        self,
        folder: Path,
        image_size: tuple[int, int],
        short_side: int | None = None,
        annotations: Path | None = None,
        labelled: bool = False,
        channels: int = 3,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        on_broken: Literal["stop", "skip"] = "stop",
        cached: int = 0,
    ):
        if short_side is not None and short_side < max(image_size):
            raise ValueError(
                f"data.short_side is {short_side}, but crops of {image_size[0]} x {image_size[1]} pixels are wanted:"
                f" make it at least {max(image_size)}"
            )
        require_image_channels(channels)
        self.folder, self.image_size, self.short_side, self.channels = folder, image_size, short_side, channels
        self.on_broken, self.cached = on_broken, cached
        found = listed_images(folder, annotations)
        self.paths = self._usable(found)
        self.skipped = len(found) - len(self.paths)
        self.classes = class_folders(folder) if labelled else None
        if labelled and any(path.parent == folder for path in self.paths):
            raise ValueError(f"{folder} holds images outside of any class: give each class a folder of its own")
        self.flips = v2.Compose([v2.RandomHorizontalFlip(horizontal_flip), v2.RandomVerticalFlip(vertical_flip)])
        self._kept: dict[int, Tensor] = {}

    def _usable(self, paths: list[Path]) -> list[Path]:
        """The images that can be read and are large enough; ValueError for others unless they are passed over."""
        sizes = {}
        for path in paths:
            try:
                sizes[path] = read_size(path)
            except BrokenImageError as error:
                if self.on_broken == "stop":
                    raise _advised(error) from error
        least = [side // 2 for side in self.image_size]  # smaller ones would be enlarged to more than twice their size
        small = {path: size for path, size in sizes.items() if size[0] < least[0] or size[1] < least[1]}
        if small and self.on_broken == "stop":
            first, (height, width) = next(iter(small.items()))
            raise ValueError(
                f"{first} has {height} x {width} pixels, less than half of the {self.image_size[0]} x"
                f" {self.image_size[1]} wanted{f', and so have {len(small) - 1} others' if len(small) > 1 else ''}:"
                " remove what is so small, pass over it with data.on_broken skip, or learn smaller images"
            )
        usable = [path for path in sizes if path not in small]
        if not usable:
            raise FileNotFoundError(f"there is no image large enough that can be read in {self.folder}")
        return usable

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        index, whole = self._readable(index)
        path = self.paths[index]
        image = to_float(self.flips(self._crop(whole)))
        label = None if self.classes is None else self.classes.index(path.relative_to(self.folder).parts[0])
        return image, {"label": label, "image_id": index, "path": str(path)}

    def _readable(self, index: int) -> tuple[int, Tensor]:
        """The image at `index`, or the next that can be read where broken ones are passed over."""
        for candidate in range(index, index + (len(self) if self.on_broken == "skip" else 1)):
            try:
                return candidate % len(self), self._image(candidate % len(self))
            except BrokenImageError as error:
                broken = error
        raise _advised(broken) from broken

    def _image(self, index: int) -> Tensor:
        image = self._kept[index] if index in self._kept else self._read(index)
        if len(self._kept) < self.cached:
            self._kept[index] = image
        return image

    def _read(self, index: int) -> Tensor:
        """An image, uint8 (C, H, W), resized so that a crop fits in it."""
        image = read_image(self.paths[index])
        if self.channels == 1:
            image = F.rgb_to_grayscale(image)
        height, width = image.shape[-2:]
        fit = max(self.image_size[0] / height, self.image_size[1] / width)
        factor = fit if self.short_side is None else max(fit, self.short_side / min(height, width))
        if factor == 1:
            return image
        return F.resize(image, [round(height * factor), round(width * factor)], antialias=True)

    def _crop(self, image: Tensor) -> Tensor:
        slack = [have - want for have, want in zip(image.shape[-2:], self.image_size, strict=True)]
        top, left = (int(torch.randint(0, room + 1, ())) for room in slack)
        return F.crop(image, top, left, *self.image_size)


def _advised(error: BrokenImageError) -> BrokenImageError:
    return BrokenImageError(f"{error}: remove it, or pass over such images with data.on_broken skip")


def require_image_channels(channels: int) -> None:
    """ValueError for channels that no image file has."""
    if channels not in (1, 3):
        raise ValueError(
            f"images have 3 channels, or 1 in grey, but the model has {channels}: set its in_channels to 3 or 1"
        )


def class_folders(folder: Path) -> list[str]:
    """The names of the folders with images in a folder, which are their classes; ValueError for none."""
    names = {path.relative_to(folder).parts[0] for path in images_below(folder) if path.parent != folder}
    if not names:
        raise ValueError(f"{folder} holds no folders of images: labelled ones are in folders of their classes")
    return sorted(names)
