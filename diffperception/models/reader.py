"""What a diffusion model's network sees in an image: its activations at blocks and times (arXiv 2112.03126)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from diffperception.models.base import Model
from diffperception.models.feature_info import FeatureInfo
from diffperception.models.generator import DiffusionModel, load_generator
from diffperception.models.unet.unet import UNet


class ActivationReader(Model):
    """Reads activations of images noised to a few times, in strides of the image, whatever the model's space.

    All images and times share one noise, a tile repeated from the upper left corner: so a pixel's noise depends neither
    on its batch nor on the image's size. Each time is one pass of the network, which stops after the last block. Maps
    come time by time, and for each in the order of the blocks.

    Args:
        generator: the model, or the file of a generator or a UNet.
        blocks: indices among ``generator.block_info``.
        timesteps: times of the generator's schedule.
        label: the class to tell a generator with classes; None for nothing, if it has learned that.
        noise_side: side of the tile of noise in pixels.
        seed: of the noise.

    Attributes:
        info: what maps :meth:`forward` gives; strides are in pixels of the image.
        multiple: of which images' sides must be.
        noise: (C, side, side), the tile.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no generator of colour images, or a block, a time or the label does not suit it; the message
            says what would.
    """

    noise: Tensor

    def __init__(
        self,
        generator: DiffusionModel | UNet | str | Path,
        blocks: Sequence[int],
        timesteps: Sequence[float] = (50,),
        label: int | None = None,
        noise_side: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        model = load_generator(generator)
        if model.space.image_channels != 3:
            raise ValueError(
                f"this UNet takes images of {model.space.image_channels} channels: features need colour images, of 3"
            )
        unknown = [block for block in blocks if block not in range(len(model.block_info))]
        if unknown or not blocks:
            choice = strides_in_words(model.block_info)
            raise ValueError(f"this UNet has no decoder blocks {unknown or list(blocks)}; it has {choice}")
        _require_different("block", [str(block) for block in blocks])
        _require_different("timestep", [f"{t:g}" for t in timesteps])
        if not timesteps:
            raise ValueError("name at least one timestep")
        self.levels = model.schedule.levels(timesteps)
        _require_label(model, label)
        self.generator, self.multiple = model, model.stride
        self.blocks, self.timesteps, self.label = list(blocks), list(timesteps), label
        self.record(generator=model, blocks=self.blocks, timesteps=self.timesteps)
        self.info = [
            replace(model.block_info[block], name=f"t{t:g} block {block}") for t in timesteps for block in blocks
        ]
        side = -(-noise_side // model.space.stride)
        drawn = torch.Generator().manual_seed(seed)
        noise = torch.randn(model.space.channels, side, side, generator=drawn, device="cpu")
        self.register_buffer("noise", noise.to(model.device))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in 0..1, sides multiples of :attr:`multiple` -> a (B, C, H / stride, W / stride) per map."""
        return self.read(self.generator.space.encode(images))

    def read(self, signal: Tensor) -> list[Tensor]:
        """As :meth:`forward`, of the signal (B, C, h, w) that the generator's space makes of images."""
        repeats = [-(-length // self.noise.shape[-1]) for length in signal.shape[2:]]
        tiled = self.noise if repeats == [1, 1] else self.noise.repeat(1, *repeats)
        noise = tiled[:, : signal.shape[2], : signal.shape[3]]
        condition = self.generator.condition(None if self.label is None else torch.tensor([self.label]))
        told = None if condition is None else condition.expand(len(signal))
        maps: list[Tensor] = []
        for alpha, sigma, time in self.levels:
            noisy = (alpha * signal + sigma * noise).to(self.generator.dtype)
            times = torch.full((len(signal),), time, device=signal.device)
            maps += self.generator.activations(noisy, times, self.blocks, told)
        return maps

    def unused(self) -> list[torch.nn.Module]:
        """The network's modules that no reading reaches."""
        network = self.generator.network
        return [*network.decoder[max(self.blocks) + 1 :], network.out_norm, network.out_conv]


def strides_in_words(info: Sequence[FeatureInfo]) -> str:
    """Which blocks there are of each stride, for messages."""
    numbered = groupby(enumerate(info), lambda pair: pair[1].stride)
    return "; ".join(f"stride {stride}: {', '.join(str(i) for i, _ in members)}" for stride, members in numbered)


def _require_different(kind: str, names: Sequence[str]) -> None:
    """A map is known by its block and time, with six digits."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"the {kind} {doubled[0]} is named more than once: name each {kind} once")


def _require_label(model: DiffusionModel, label: int | None) -> None:
    """ValueError unless the model can be told this label, or nothing."""
    count = len(model.classes or ())
    if label is None and not model.has_absent:
        raise ValueError(
            f"this UNet has classes, and none that stands for nothing: give it a label from 0 to {count - 1}"
        )
    if label is not None and not count:
        raise ValueError("this UNet has no classes: leave the label out")
    if label is not None and label not in range(count + model.has_absent):
        raise ValueError(f"this UNet has classes: give it a label from 0 to {count - 1}, not {label}")
