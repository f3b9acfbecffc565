"""Where pixels get their features from: a diffusion model, any timm model, or the colours themselves."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from diffperception import weights
from diffperception.diffusion import DiscreteSchedule, Schedule, StraightPath, linear_schedule
from diffperception.models import TimmBackbone, UNet
from diffperception.segmentation.maps import FeatureMaps, MapInfo, Windows, padded_side

# Windows that are encoded at once: small ones keep no processor busy, large ones need no company and much memory.
BATCH_WINDOWS = 8
BATCH_PIXELS = 2**16


class FeatureExtractor(nn.Module, ABC):
    """Images of any size to feature maps. Its weights are not trained.

    Args:
        info: the maps it gives.
        multiple: what it needs an image's sides to be multiples of; images are padded with their last pixels.
        window: larger images are cut into overlapping windows of this side, a multiple of ``multiple``; if None, none
            are.

    Raises:
        ValueError: if the window is not a multiple.
    """

    arguments: dict[str, Any]  # of the constructor; JSON-able

    def __init__(self, info: Sequence[MapInfo], multiple: int = 1, window: int | None = None) -> None:
        super().__init__()
        if window is not None and (window % multiple or window < 2 * multiple):
            raise ValueError(f"the window must be a multiple of {multiple} pixels and at least two, not {window}")
        self.info = list(info)
        self.multiple = multiple
        self.window = window

    @property
    def channels(self) -> int:
        """D, the features a pixel has."""
        return sum(map_info.channels for map_info in self.info)

    @property
    def strides(self) -> list[int]:
        return [map_info.stride for map_info in self.info]

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.state_dict().values()), torch.device("cpu"))

    @abstractmethod
    def encode(self, images: Tensor) -> list[Tensor]:
        """(B, 3, h, w) in 0..1, one window, sides multiples of :attr:`multiple` -> a (B, C, h / s, w / s) a map."""

    @torch.no_grad()
    def maps(self, image: Tensor) -> FeatureMaps:
        """The feature maps of an image, float32.

        Args:
            image: (3, H, W) RGB, 0..1, of any size.

        Raises:
            ValueError: if it has another shape.
        """
        if image.dim() != 3 or len(image) != 3 or not image.numel():
            raise ValueError(f"an image must be of shape (3, height, width), not {tuple(image.shape)}")
        height, width = image.shape[1:]
        below, right = (padded_side(side, self.multiple) - side for side in (height, width))
        padded = F.pad(image[None].to(self.device, torch.float32), (0, right, 0, below), mode="replicate")
        windows = self.windows(*padded.shape[2:])
        cut = [padded[0, :, rows, columns] for rows, columns in windows.places]  # all of one size
        together = max(1, min(BATCH_WINDOWS, BATCH_PIXELS // cut[0][0].numel()))
        parts: list[tuple[Tensor, ...]] = []
        for first in range(0, len(cut), together):
            parts += zip(*self.encode(torch.stack(cut[first : first + together])), strict=True)
        return FeatureMaps(windows.blend(parts, self.strides), self.strides, (height, width))

    def windows(self, height: int, width: int) -> Windows:
        """How an image with sides that are multiples is cut; a quarter of a window overlaps the next."""
        side = self.window or max(height, width)
        return Windows(height, width, side, side // 4 // self.multiple * self.multiple)

    def map_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Cells, down and across, of each map of an image of any size."""
        height, width = (padded_side(side, self.multiple) for side in (height, width))
        return [(height // stride, width // stride) for stride in self.strides]


class DiffusionFeatures(FeatureExtractor):
    """What decoder blocks of a diffusion model's UNet give for an image noised to a few times (arXiv 2112.03126).

    All images and times share one noise, drawn on the CPU and kept among the weights. Each time is one pass of the
    UNet, which stops after the last block. Maps come time by time, and for each in the order of the blocks.

    Args:
        unet: the network, or its constructor's arguments; it is put into evaluation mode and its weights are fixed.
        schedule: the path that the network was trained on; or what it says at each of the times: its signal, its noise
            and the time as the network is told it.
        blocks: decoder blocks, indices among ``unet.block_info``.
        timesteps: times of the schedule.
        window: side of the images that the network was trained on; larger ones are cut into windows.
        seed: of the noise.
        label: of a network with classes: the class to tell it, such as the absent label of classifier-free guidance.

    Attributes:
        noise: (C, window, window), used from its upper left corner.

    Raises:
        ValueError: if a block or a time does not exist or is named twice (times to six digits), or the label is
            missing or not wanted.
    """

    noise: Tensor

    def __init__(
        self,
        unet: UNet | dict[str, Any],
        schedule: Schedule | Sequence[Sequence[float]],
        blocks: Sequence[int] = (5, 6, 7, 8, 12),
        timesteps: Sequence[float] = (50, 150, 250),
        window: int = 256,
        seed: int = 0,
        label: int | None = None,
    ) -> None:
        unet = unet if isinstance(unet, UNet) else UNet(**unet)
        if unet.in_channels != 3:
            raise ValueError(f"this UNet takes images of {unet.in_channels} channels: features need one of colour, 3")
        _check_blocks(unet, blocks)
        _check_different("block", [str(block) for block in blocks])
        _check_different("timestep", [f"{t:g}" for t in timesteps])
        _check_label(unet, label)
        levels = _levels(schedule, timesteps)
        info = [
            MapInfo(f"t{t:g} block {block}", unet.block_info[block].channels, unet.block_info[block].stride)
            for t in timesteps
            for block in blocks
        ]
        super().__init__(info, unet.stride, window)
        self.arguments = {
            "unet": unet.arguments,
            "schedule": levels,
            "blocks": list(blocks),
            "timesteps": list(timesteps),
            "window": window,
            "seed": seed,
            "label": label,
        }
        self.unet = unet.eval().requires_grad_(False)
        self.levels, self.blocks, self.timesteps, self.label = levels, list(blocks), list(timesteps), label
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(unet.in_channels, window, window, generator=generator, device="cpu")
        self.register_buffer("noise", noise.to(unet.stem.weight.device))

    @classmethod
    def of_generator(
        cls,
        file: Path,
        blocks: Sequence[int] = (5, 6, 7, 8, 12),
        timesteps: Sequence[float] = (50, 150, 250),
        window: int | None = None,
        seed: int = 0,
        label: int | None = None,
    ) -> "DiffusionFeatures":
        """Of a saved generator, which knows its schedule; or of a UNet alone, on the linear schedule of 1000 steps.

        Args:
            file: a model.safetensors file.
            blocks: decoder blocks, indices among the UNet's `block_info`.
            timesteps: times of the schedule.
            window: larger images are cut into windows of this side; null for what the generator was trained on.
            seed: of the noise.
            label: the class to tell a network that has classes; null for its absent label, where it has one.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it holds another model, or a block or a time does not exist.
        """
        model = weights.load_model(file)
        unet = getattr(model, "unet", model)
        if not isinstance(unet, UNet):
            raise ValueError(f"{file} holds a {type(model).__name__}: give the file of a generator or a UNet")
        if label is None and getattr(model, "absent_label", False):
            label = (unet.num_classes or 0) - 1  # the last one
        side = window or max(getattr(model, "image_size", (256,)))
        side = max(padded_side(side, unet.stride), 2 * unet.stride)
        return cls(unet, getattr(model, "schedule", linear_schedule(1000)), blocks, timesteps, side, seed, label)

    def encode(self, images: Tensor) -> list[Tensor]:
        clean = 2 * images - 1
        noise = self.noise[:, : images.shape[2], : images.shape[3]]
        labels = None if self.label is None else torch.full((len(images),), self.label, device=images.device)
        maps = []
        for signal, sigma, time in self.levels:
            noisy = (signal * clean + sigma * noise).to(self.unet.stem.weight.dtype)
            times = torch.full((len(images),), time, device=images.device)
            maps += self.unet.activations(noisy, times, self.blocks, labels)
        return [m.float() for m in maps]

    def at_timestep(self, index: int) -> "DiffusionFeatures":
        """The same network and noise with a single one of the times."""
        arguments = self.arguments | {
            "unet": self.unet,
            "schedule": [self.levels[index]],
            "timesteps": [self.timesteps[index]],
        }
        features = DiffusionFeatures(**arguments)
        features.noise = self.noise
        return features


class TimmFeatures(FeatureExtractor):
    """The feature maps of any timm model that takes images of any size, normalised as those it was trained on.

    Args:
        name: timm model name.
        strides: of the maps to take; where a model has several of a stride, as transformers have, the last is taken.
        pretrained: start from timm's weights (needs the network once).
        window: larger images are cut into windows of this side; null takes images whole.

    Raises:
        ValueError: if there is no such model, it has no map at one of the strides, or takes images of one size alone.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, strides: Sequence[int] = (4, 8, 16, 32), pretrained: bool = False, window: int | None = None
    ) -> None:
        backbone = TimmBackbone(name, strides, pretrained).eval().requires_grad_(False)
        _check_any_size(backbone, name)
        channels = zip(backbone.channels, strides, strict=True)
        super().__init__([MapInfo(f"stride {s}", c, s) for c, s in channels], max(strides), window)
        # Loading brings its own weights, so `pretrained` is not kept.
        self.arguments = {"name": name, "strides": list(strides), "pretrained": False, "window": window}
        self.backbone = backbone
        about = timm.get_pretrained_cfg(name)
        mean, std = (about.mean, about.std) if about else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def encode(self, images: Tensor) -> list[Tensor]:
        return self.backbone((images - self.mean) / self.std)


class RGBFeatures(FeatureExtractor):
    """The colours of a pixel, -1..1: what any other features should beat."""

    def __init__(self) -> None:
        super().__init__([MapInfo("RGB", 3, 1)])
        self.arguments = {}

    def encode(self, images: Tensor) -> list[Tensor]:
        return [2 * images - 1]


def build_extractor(name: str, arguments: dict[str, Any]) -> FeatureExtractor:
    """The extractor of a class name and its constructor's arguments, as an exported file tells them."""
    kinds: dict[str, type[FeatureExtractor]] = {
        kind.__name__: kind for kind in (DiffusionFeatures, TimmFeatures, RGBFeatures)
    }
    if name not in kinds:
        raise ValueError(f"there are no features {name!r}; known are {', '.join(kinds)}")
    return kinds[name](**arguments)


@torch.no_grad()
def _check_any_size(backbone: TimmBackbone, name: str) -> None:
    side = max(backbone.strides)
    try:
        backbone(torch.zeros(1, 3, 2 * side, 3 * side))
    except (AssertionError, RuntimeError, ValueError) as error:  # timm's models refuse sizes in ways of their own
        raise ValueError(
            f"{name} does not take images of any size ({error}): choose a convolutional network, a ViT or a Swin"
        ) from None


def _check_blocks(unet: UNet, blocks: Sequence[int]) -> None:
    missing = [block for block in blocks if block not in range(len(unet.block_info))]
    if missing or not blocks:
        last = len(unet.block_info) - 1
        raise ValueError(f"this UNet has decoder blocks 0 to {last}; there is no {missing or 'block named'}")


def _check_different(kind: str, names: Sequence[str]) -> None:
    """A map is known by its time and block, times written with six digits."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"the {kind} {doubled[0]} is named more than once: name each {kind} once")


def _check_label(unet: UNet, label: int | None) -> None:
    if unet.num_classes is None and label is not None:
        raise ValueError("this UNet has no classes; leave the label out")
    if unet.num_classes is not None and (label is None or label not in range(unet.num_classes)):
        raise ValueError(
            f"this UNet has classes: give as label the absent label that it was trained with, or any of 0 to "
            f"{unet.num_classes - 1}, not {label}"
        )


def _levels(schedule: Schedule | Sequence[Sequence[float]], times: Sequence[float]) -> list[list[float]]:
    """Signal, noise and the network's time at each of the times."""
    if not isinstance(schedule, Schedule):
        return [list(level) for level in schedule]
    if isinstance(schedule, DiscreteSchedule):
        wrong = [t for t in times if t not in range(schedule.num_timesteps)]
        if wrong:
            raise ValueError(f"the timesteps must be whole, 0 to {schedule.num_timesteps - 1}, not {wrong}")
        times = [int(t) for t in times]
    if not times:
        raise ValueError("name at least one timestep")
    rows = [(schedule.alpha(t), schedule.sigma(t), schedule.conditioning(torch.as_tensor(t))) for t in times]
    levels = [[float(value) for value in row] for row in rows]
    outside = [
        t
        for t, (signal, noise, _) in zip(times, levels, strict=True)
        if not (0 <= signal < math.inf and 0 <= noise < math.inf)
    ]
    if outside:
        known = "from 0 to 1, such as 0.05 and 0.15" if isinstance(schedule, StraightPath) else "0 or more"
        raise ValueError(f"the timesteps {outside} lie outside of this generator's path: its times are {known}")
    return levels
