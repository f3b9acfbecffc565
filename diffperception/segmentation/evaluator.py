"""Mean intersection over union over the pixels that are labelled and the classes that occur."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from diffperception.data.masks import IGNORE_INDEX


class MeanIoU:
    """Counts predictions of any number of images in one confusion matrix.

    Pixels that the mask ignores count nowhere. A class that neither mask nor prediction has is left out of the mean.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)  # rows are the mask's classes

    def update(self, labels: Tensor, mask: Tensor) -> None:
        """Count labels, 0..K-1, and their mask of the same shape, 0..K-1 or 255; ValueError for others."""
        num_classes = len(self.confusion)
        if labels.shape != mask.shape:
            raise ValueError(f"the prediction is of shape {tuple(labels.shape)}, its mask of {tuple(mask.shape)}")
        labels, mask = labels.cpu().long(), mask.cpu().long()
        labelled = mask != IGNORE_INDEX
        labels, mask = labels[labelled], mask[labelled]
        unknown = sorted({*labels.unique().tolist(), *mask.unique().tolist()} - {*range(num_classes)})
        if unknown:
            raise ValueError(f"there are classes 0 to {num_classes - 1}, but values {unknown} occur")
        pairs = torch.bincount(mask * num_classes + labels, minlength=num_classes**2)
        self.confusion += pairs.view(num_classes, num_classes)

    def gather(self) -> None:
        """Add up what all processes have counted, if there are several."""
        if dist.is_initialized():
            dist.all_reduce(self.confusion)

    def per_class(self) -> list[float]:
        """IoU of each class, NaN where it occurs in no mask and no prediction."""
        hit = self.confusion.diag().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diag()
        return (hit / union).tolist()

    def mean(self) -> float:
        """Mean IoU of the classes that occur, NaN without any."""
        occurring = [iou for iou in self.per_class() if not math.isnan(iou)]
        return sum(occurring) / len(occurring) if occurring else math.nan

    def named(self, classes: Sequence[str]) -> dict[str, float]:
        """`miou` and the IoU of each class that occurs, by its name."""
        ious = {"miou": self.mean(), **dict(zip(classes, self.per_class(), strict=True))}
        return {name: iou for name, iou in ious.items() if not math.isnan(iou)}

    def summary(self, classes: Sequence[str]) -> dict[str, float | dict[str, float | None] | None]:
        """`miou` and `iou` by class name, None for what does not occur: ready for JSON."""
        mean, *ious = (None if math.isnan(iou) else iou for iou in (self.mean(), *self.per_class()))
        return {"miou": mean, "iou": dict(zip(classes, ious, strict=True))}
