"""The options that say which images and masks pixel classifiers learn from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from diffperception.data.masks import IGNORE_INDEX, MaskFolder
from diffperception.segmentation.segmenter import check_names


@dataclass
class MaskDataOptions:
    """Which images and masks there are.

    Args:
        images: folder with pictures.
        masks: folder with their masks, of the same names: PNG of one channel or NPY, in each pixel its class's number.
        classes: names of the classes 0, 1, ...
        annotations: only the images are used that this COCO JSON file lists, or this text file with a name a line.
        limit: use only so many of the images, chosen by the seed; null for all.
        unlabelled: what to do at an image without a mask: stop, naming it, or leave it out.
        val_images: folder with pictures to measure on; null for none.
        val_masks: folder with their masks.
        val_annotations: as `annotations`, of `val_images`.
        ignore: the value in masks of pixels without a label; null for none.
        mask_values: class numbers of the values in masks where they differ, such as {0: 0, 255: 1}.
        short_side: work on images resized to this short side, best that which the generator learned from; scores
            are always measured at the masks' own size. null for no resizing.
    """

    images: Path
    masks: Path
    classes: list[str]
    annotations: Path | None = None
    limit: PositiveInt | None = None
    unlabelled: Literal["stop", "skip"] = "stop"
    val_images: Path | None = None
    val_masks: Path | None = None
    val_annotations: Path | None = None
    ignore: int | None = IGNORE_INDEX
    mask_values: dict[int, int] | None = None
    short_side: PositiveInt | None = None

    def open(self, seed: int = 0) -> MaskFolder:
        """The images to learn from, resized; ValueError if two classes have one name."""
        return MaskFolder(
            self.images,
            self.masks,
            len(check_names(self.classes)),
            self.ignore,
            self.mask_values,
            self.annotations,
            self.unlabelled,
            self.limit,
            seed,
            self.short_side,
        )

    def open_val(self) -> MaskFolder | None:
        """The images to measure on, at their own size."""
        if self.val_images is None or self.val_masks is None:
            if self.val_images is not self.val_masks:
                raise ValueError("give both data.val_images and data.val_masks, or neither")
            return None
        return MaskFolder(
            self.val_images,
            self.val_masks,
            len(self.classes),
            self.ignore,
            self.mask_values,
            self.val_annotations,
            self.unlabelled,
        )
