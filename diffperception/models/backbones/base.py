"""Backbones, images to feature maps: what detectors are built on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from diffperception.models.base import Model
from diffperception.models.feature_info import FeatureInfo


class Backbone(Model):
    """Images (B, 3, H, W), normalised, to one (B, C, H / stride, W / stride) per level; yours may derive from it."""

    info: list[FeatureInfo]  # of the maps, finest first, each stride twice the one before
    multiple: int = 32  # images' height and width must be multiples of it
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN  # images are normalised with it; of pixels in 0..1, as std
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD
    is_pyramid: bool = False  # whether its maps are a pyramid of one width: a head of that width builds no other on it

    def layers(self, stages: bool = False) -> dict[str, int]:
        """The number of the layer, or of the stage, of each parameter by its name, from the images on, from 0 on.

        By default all are one.
        """
        return dict.fromkeys((name for name, _ in self.named_parameters()), 0)

    @property
    def channels(self) -> list[int]:
        return [info.channels for info in self.info]

    @property
    def strides(self) -> list[int]:
        return [info.stride for info in self.info]


def numbered(groups: Mapping[str, int | None]) -> dict[str, int]:
    """The groups that names are in, numbered from 0 on in their order; names in none are in the last."""
    order = {group: number for number, group in enumerate(sorted({g for g in groups.values() if g is not None}))}
    last = max(order.values(), default=0)
    return {name: last if group is None else order[group] for name, group in groups.items()}


def pad_images(images: Sequence[Tensor], mean: Tensor, std: Tensor, multiple: int) -> Tensor:
    """Normalise images (3, H, W; 0..1) of any sizes and pad them with zeros, right and below, into one batch.

    It is (B, 3, H, W) in channels-last memory, H and W multiples of `multiple`. ``mean`` and ``std`` (3, 1, 1) are of
    pixels in 0..255, the reference's scale: rounding on it agrees to the last bit.
    """
    height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
    height, width = (-(-side // multiple) * multiple for side in (height, width))
    batch = mean.new_zeros(len(images), 3, height, width)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[-2], : image.shape[-1]] = (image.to(mean) * 255 - mean) / std
    return batch.contiguous(memory_format=torch.channels_last)


def any_size(
    read: Callable[[Tensor], Sequence[Tensor]],
    images: Tensor,
    multiple: int,
    strides: Sequence[int],
    mode: Literal["constant", "replicate"] = "constant",
) -> list[Tensor]:
    """The maps that ``read`` gives of images (B, 3, H, W) of any size: one (B, C, ceil(H / s), ceil(W / s)) per stride.

    Args:
        read: takes images whose height and width are multiples of ``multiple``, and gives a map for each stride s.
        mode: what images are padded with, right and below: zeros, or their last pixels.
    """
    height, width = images.shape[-2:]
    maps = read(F.pad(images, (0, -width % multiple, 0, -height % multiple), mode=mode))
    return [m[..., : -(-height // s), : -(-width // s)] for m, s in zip(maps, strides, strict=True)]
