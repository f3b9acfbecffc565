"""A UNet that tells the classes of pixels itself: what pixel classifiers on learned features should beat."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.data.masks import IGNORE_INDEX
from diffperception.models import UNet
from diffperception.segmentation.maps import pad


def segmentation_unet(unet: UNet, num_classes: int) -> UNet:
    """A new UNet like a generator's, with random weights, that gives a logit for each of K classes.

    ValueError for a network of diffusers.
    """
    return UNet(**own_unet(unet).arguments | {"out_channels": num_classes}).to(unet.device)


def own_unet(network: nn.Module) -> UNet:
    """The network, if it is a UNet of ours, which others can be made like; ValueError for those that diffusers runs."""
    if not isinstance(network, UNet):
        raise ValueError(
            "a UNet from scratch is made like a generator's own UNet, and the network of this one is diffusers': name"
            " another generator, or compare without the method scratch"
        )
    return network


@torch.no_grad()
def predict_labels(unet: UNet, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(H, W) int64 classes of an image (3, H, W) of any size; of another `size`, to which logits are interpolated."""
    height, width = image.shape[1:]
    padded = pad(image.to(unet.device), unet.stride)
    logits = unet(2 * padded - 1, torch.zeros(1, device=padded.device)).float()[:, :, :height, :width]
    if size is not None:
        logits = F.interpolate(logits, size, mode="bilinear")
    return logits[0].argmax(0).cpu()


def random_crop(image: Tensor, mask: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square part of an image and of its mask, mirrored both ways at random; ignored where the image ends."""
    right, below = (max(0, side - length) for length in (image.shape[2], image.shape[1]))
    image, mask = F.pad(image, (0, right, 0, below)), F.pad(mask, (0, right, 0, below), value=IGNORE_INDEX)
    top, left = (
        int(torch.randint(length - side + 1, (), generator=generator)) for length in (image.shape[1], image.shape[2])
    )
    image, mask = image[:, top : top + side, left : left + side], mask[top : top + side, left : left + side]
    axes = [axis for axis in (-1, -2) if torch.rand((), generator=generator) < 0.5]
    return image.flip(axes), mask.flip(axes)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled pixels; 0, not NaN, where the crops have none."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)
