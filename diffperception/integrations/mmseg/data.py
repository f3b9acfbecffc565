"""Data sets of mmsegmentation in our training."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset

from diffperception.data.masks import IGNORE_INDEX


class LabelledDataset(Dataset[tuple[Tensor, Tensor]]):
    """A data set of mmseg as images and masks that our training takes: see :func:`labelled`.

    Sample i, drawn anew by the pipeline whenever it is asked for, is an image, RGB, uint8 (3, H, W), or float32 in 0..1
    where the pipeline gives floats, and its mask, int64 (H, W), 0..K-1 or 255.
    """

    def __init__(self, dataset: Any, channel_order: Literal["bgr", "rgb"]) -> None:
        if channel_order not in ("bgr", "rgb"):
            raise ValueError(f"channel_order is bgr or rgb, not {channel_order!r}")
        if not (classes := dataset.metainfo.get("classes")):
            raise ValueError("the data set does not name its classes: give it metainfo=dict(classes=[...])")
        self.dataset, self.channel_order, self.classes = dataset, channel_order, list(classes)

    @property
    def names(self) -> list[str]:
        """Paths of the images."""
        return [str(self.dataset.get_data_info(index)["img_path"]) for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in range(len(self)):
            raise IndexError(index)
        drawn = self.dataset[index]
        image, sample = drawn.get("inputs"), drawn.get("data_samples")
        if not isinstance(image, Tensor) or "gt_sem_seg" not in (sample or {}):
            raise ValueError(
                "the data set's pipeline gives no image with a mask: it needs LoadAnnotations and PackSegInputs"
            )
        name = sample.get("img_path", f"sample {index}")
        mask = sample.gt_sem_seg.data[0].long()
        if image.shape[1:] != mask.shape:
            raise ValueError(
                f"the pipeline gives {name} the size {tuple(image.shape[1:])} and its mask {tuple(mask.shape)}: put"
                " LoadAnnotations before Resize, as pipelines for training have it"
            )
        return self._rgb(image, name), mask.masked_fill(mask == _ignored(self.dataset), IGNORE_INDEX)

    def _rgb(self, image: Tensor, name: str) -> Tensor:
        image = image.flip(0) if self.channel_order == "bgr" else image
        if image.dtype == torch.uint8:
            return image
        if float(image.min()) < 0 or float(image.max()) > 255:
            raise ValueError(f"the pipeline gives {name} pixels outside of 0 to 255: leave Normalize out of it")
        return image.float() / 255


def _ignored(dataset: Any) -> int:
    """The label that a data set ignores, or the first of those that it joins or repeats."""
    while not hasattr(dataset, "ignore_index"):
        within = [*getattr(dataset, "datasets", []), getattr(dataset, "dataset", None)]
        if within[0] is None:
            return IGNORE_INDEX
        dataset = within[0]
    return int(dataset.ignore_index)


def labelled(dataset: Mapping[str, Any] | Any, channel_order: Literal["bgr", "rgb"] = "bgr") -> LabelledDataset:
    """A data set of mmseg, or its configuration, as our training takes it: images and masks of one sequence.

    ``reduce_zero_label``, classes that are left out, crops and flips are what the data set and its pipeline say.

    Args:
        dataset: with a pipeline that ends in PackSegInputs; such as ``cfg.train_dataloader.dataset``.
        channel_order: of what the pipeline gives; LoadImageFromFile gives BGR by default.

    Raises:
        ValueError: it is a data loader's configuration, or does not name its classes; there is no such channel order;
            when a sample is drawn: there is no mask, it is of another size than its image, or the image is normalised
            already.
    """
    if isinstance(dataset, Mapping):
        if "type" not in dataset and "dataset" in dataset:
            raise ValueError("this is the configuration of a data loader: give that of its data set, loader.dataset")
        init_default_scope("mmseg")
        dataset = DATASETS.build(dataset)
    return LabelledDataset(dataset, channel_order)
