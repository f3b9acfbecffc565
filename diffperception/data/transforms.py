"""Random changes of training images, their boxes and masks, composed of torchvision's v2 transforms."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from diffperception.data.soundness import resizing

Target = dict[str, Any]
STRIP = 20  # so many times as long as wide, or more, is an image that is not enlarged as others are before it is cut
IOU_CROP = 0.3  # of the sides of an image are left at least by torchvision's RandomIoUCrop
PER_BOX = ("boxes", "labels", "iscrowd", "area", "masks")


class TrainingTransforms:
    """Flips, crops, resizing and colour changes of one training sample; the defaults are the reference's COCO recipe.

    All draws come from torch's global generator (see `SeededSamples`). Called with a uint8 `tv_tensors.Image` and a
    target whose boxes are `tv_tensors.BoundingBoxes`, it returns both changed. Boxes are clipped to the new image;
    those with a side below `min_box_side`, and crowd regions, leave the target with their labels, iscrowd, area and,
    where there are some, masks.

    Args:
        horizontal_flip: probability that a sample is mirrored left to right.
        vertical_flip: probability that it is mirrored top to bottom; for scenes without an up and a down.
        photometric: probability that its brightness, contrast, saturation and hue are changed.
        zoom_out: probability that it is put into a grey canvas up to twice as wide, so that objects become smaller.
        iou_crop: probability that it is cut as in SSD: a random part that contains some box to a random extent. Useful,
            with zoom_out, on small data sets.
        crop: probability that it is first resized to a short side of `crop_short_sides` and then cut to a part with
            width and height drawn from `crop_sides`, its two bounds.
        crop_short_sides: see crop.
        crop_sides: see crop.
        short_sides: at last the short side is resized to one of these, in pixels; none: sizes are left as they are.
        max_long_side: in pixels; where the long side would exceed it, the short side becomes smaller.
        min_box_side: in pixels of the changed image.
    """

    def __init__(
        self,
        horizontal_flip: float = 0.5,
        vertical_flip: float = 0.0,
        photometric: float = 0.0,
        zoom_out: float = 0.0,
        iou_crop: float = 0.0,
        crop: float = 0.5,
        crop_short_sides: Sequence[int] = (400, 500, 600),
        crop_sides: tuple[int, int] = (384, 600),
        short_sides: Sequence[int] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        max_long_side: int = 1333,
        min_box_side: float = 1.0,
    ):
        self.short_sides, self.max_long_side = tuple(short_sides), max_long_side
        self.crop_short_sides, self.crop_sides = tuple(crop_short_sides), crop_sides
        self.crop, self.iou_crop = crop, iou_crop
        probabilities = (horizontal_flip, vertical_flip, photometric, zoom_out, iou_crop, crop)
        if not all(0 <= p <= 1 for p in probabilities):
            raise ValueError(f"the probabilities of changes must lie in 0..1, not {probabilities}")
        self.min_box_side = min_box_side
        steps: list[torch.nn.Module] = [
            v2.RandomHorizontalFlip(horizontal_flip),
            v2.RandomVerticalFlip(vertical_flip),
            v2.RandomApply([v2.RandomPhotometricDistort(p=0.5)], photometric),
            v2.RandomZoomOut(fill={tv_tensors.Image: 127, "others": 0}, side_range=(1, 2), p=zoom_out),
            v2.RandomApply([v2.RandomIoUCrop()], iou_crop),
            v2.RandomApply(
                [ShortestSize(crop_short_sides, self._longest_to_crop()), RandomSizeCrop(*crop_sides)], crop
            ),
        ]
        if short_sides:
            steps.append(ShortestSize(short_sides, max_long_side))
        self.steps = v2.Compose(steps)

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        image, target = self.steps(image, target)
        return image, clean(target, self.min_box_side)

    def _longest_to_crop(self) -> int:
        """So long may an image become before it is cut: a strip one pixel wide would else fill the memory."""
        return STRIP * max(self.crop_short_sides, default=1)

    def largest_scale(self, sizes: np.ndarray) -> np.ndarray:
        """(n,) the most that images of `sizes` (n, 2), width and height, are enlarged by."""
        short, side = max(self.short_sides, default=None), np.maximum(sizes, 1).min(axis=1)
        largest = resizing(sizes, short, self.max_long_side)
        if self.crop:
            before = resizing(sizes, max(self.crop_short_sides), self._longest_to_crop())
            cut = np.minimum(before * side, min(self.crop_sides))  # the short side of the smallest part
            largest = np.maximum(largest, before * (1 if short is None else np.maximum(1, short / cut)))
        return largest / (IOU_CROP if self.iou_crop else 1)


class ShortestSize(v2.RandomShortestSize):
    """torchvision's, but at least one pixel is left of the other side."""

    def __init__(self, sides: Sequence[int], max_size: int):
        super().__init__(list(sides), max_size=max_size)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        params = super().make_params(flat_inputs)
        return params | {"size": tuple(max(1, side) for side in params["size"])}


class RandomSizeCrop(v2.Transform):
    """Cut a part whose height and width are drawn from min_side..max_side, or less where the image is smaller."""

    def __init__(self, min_side: int, max_side: int):
        super().__init__()
        if not 1 <= min_side <= max_side:
            raise ValueError(f"a crop needs 1 <= min_side <= max_side, not {min_side} and {max_side}")
        self.min_side, self.max_side = min_side, max_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(next(x for x in flat_inputs if isinstance(x, tv_tensors.Image)))
        top, height = self._draw(height)
        left, width = self._draw(width)
        return {"top": top, "left": left, "height": height, "width": width}

    def _draw(self, side: int) -> tuple[int, int]:
        """Where a part of a side begins, and its length."""
        low, high = min(self.min_side, side), min(self.max_side, side)
        length = int(torch.randint(low, high + 1, ()))
        return int(torch.randint(0, side - length + 1, ())), length

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(v2.functional.crop, inpt, **params)


def clean(target: Target, min_box_side: float) -> Target:
    """Clip boxes to the image; leave out crowd regions and boxes with a side below `min_box_side` pixels."""
    boxes = v2.functional.clamp_bounding_boxes(target["boxes"])
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = (sides >= min_box_side).all(dim=1) & (target["iscrowd"] == 0)
    target = target | {"boxes": boxes}
    names = [name for name in PER_BOX if name in target]
    return target | {name: tv_tensors.wrap(target[name][kept], like=target[name]) for name in names}
