"""Backbones: images to feature maps, what detectors are built on."""

from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from diffperception.models.base import Model
from diffperception.models.feature_info import FeatureInfo


class Backbone(Model):
    """Images to feature maps, which a pyramid and a detector are built on; yours may derive from it.

    Attributes:
        info: of the maps, finest first, each stride twice the one before.
        multiple: of which the images' height and width are.
        mean, std: that images are normalised with, of pixels in 0..1.
        is_pyramid: its maps are a pyramid already, all of one width: a detector whose head has this width builds no
            other on them.
    """

    info: list[FeatureInfo]
    multiple: int = 32
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    is_pyramid: bool = False

    @property
    def channels(self) -> list[int]:
        return [info.channels for info in self.info]

    @property
    def strides(self) -> list[int]:
        return [info.stride for info in self.info]


def pad_images(images: Sequence[Tensor], mean: Tensor, std: Tensor, multiple: int) -> Tensor:
    """Normalise images (3, H, W; 0..1) of any sizes and pad them with zeros, right and below, into one batch.

    Args:
        mean, std: (3, 1, 1) of pixels in 0..255, the reference's scale: rounding on it agrees to the last bit.

    Returns: (B, 3, H, W) in channels-last memory, H and W multiples of `multiple`.
    """
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    height, width = (-(-side // multiple) * multiple for side in (height, width))
    batch = mean.new_zeros(len(images), 3, height, width)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[-2], : image.shape[-1]] = (image.to(mean) * 255 - mean) / std
    return batch.contiguous(memory_format=torch.channels_last)
