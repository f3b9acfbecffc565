"""A UNet trained from scratch on the labels alone: what pixel classifiers on learned features should beat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from diffperception.data.masks import IGNORE_INDEX
from diffperception.models import UNet
from diffperception.segmentation.maps import padded_side
from diffperception.segmentation.pixels import check_size

WARMUP = 0.05  # share of the steps in which the learning rate rises; then it falls along a half cosine
REPORTED = 20  # steps whose mean loss is told


@dataclass
class BaselineOptions:
    """How the UNet learns.

    Args:
        steps: updates of the weights.
        batch_size: crops an update.
        crop: side of the crops in pixels, a multiple of the UNet's stride; mirrored both ways at random.
        lr: learning rate of AdamW, the highest.
        weight_decay: of AdamW.
        bf16: compute in bfloat16 where autocast does.
    """

    steps: int = 400
    batch_size: int = 8
    crop: int = 64
    lr: float = 1e-3
    weight_decay: float = 1e-2
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


def segmentation_unet(unet: UNet, num_classes: int) -> UNet:
    """A new UNet like a generator's, with random weights, that gives a logit for each of K classes."""
    return UNet(**unet.arguments | {"out_channels": num_classes}).to(unet.device)


def train_unet(
    unet: UNet, images: Sequence[Tensor], masks: Sequence[Tensor], options: BaselineOptions, seed: int = 0
) -> float:
    """Train a UNet to tell pixels' classes by cross entropy; its time is always 0.

    Args:
        unet: of as many output channels as there are classes.
        images: (3, H, W) each, RGB, 0..1, of any sizes.
        masks: (H, W) each, 0..K-1 or 255 for pixels to ignore.
        seed: of the crops.

    Returns: the mean loss of the last steps.

    Raises:
        ValueError: if a mask is not of its image's size, or the crop does not suit the UNet.
    """
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        check_size(image, mask, f"image {number}")
    unet.check_size(options.crop, options.crop)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(unet.parameters(), options.lr, weight_decay=options.weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, options.steps))
    losses: list[float] = []
    unet.train()
    with tqdm(total=options.steps, desc="UNet from scratch", unit="step", leave=False, disable=None) as bar:
        for _ in range(options.steps):
            chosen = torch.randint(len(images), (options.batch_size,), generator=generator).tolist()
            crops = [random_crop(images[i], masks[i], options.crop, generator) for i in chosen]
            batch, labels = (torch.stack(part).to(unet.device) for part in zip(*crops, strict=True))
            loss = _loss(_logits(unet, batch, options.bf16), labels.long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
            losses.append(loss.item())
            bar.update()
    unet.eval()
    return sum(losses[-REPORTED:]) / len(losses[-REPORTED:])


@torch.no_grad()
def predict_labels(unet: UNet, image: Tensor, size: tuple[int, int] | None = None, bf16: bool = False) -> Tensor:
    """(H, W) int64 classes of an image (3, H, W) of any size, which is padded with its last pixels.

    Args:
        size: height and width that the logits are interpolated to, if others than the image's.
        bf16: as in the options.
    """
    height, width = image.shape[1:]
    below, right = (padded_side(side, unet.stride) - side for side in (height, width))
    padded = F.pad(image[None].to(unet.device), (0, right, 0, below), mode="replicate")
    logits = _logits(unet, padded, bf16)[:, :, :height, :width]
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


def _logits(unet: UNet, images: Tensor, bf16: bool) -> Tensor:
    times = torch.zeros(len(images), device=images.device)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        return unet(2 * images - 1, times).float()


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled pixels; 0, not NaN, where the crops have none."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labels != IGNORE_INDEX).sum().clamp(min=1)


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
