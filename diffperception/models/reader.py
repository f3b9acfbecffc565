"""What a diffusion model's network sees in an image: its activations at blocks and times (arXiv 2112.03126)."""

from collections.abc import Sequence
from dataclasses import replace
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
        generator: the model, the file of a generator or a UNet, or a folder of diffusers.
        blocks: indices among ``generator.block_info``; of networks of diffusers, also names of modules.
        timesteps: times of the generator's schedule.
        label: the class to tell a generator with classes; None for nothing, if it has learned that.
        noise_side: side of the tile of noise in pixels.
        seed: of the noise.
        attention: maps of how much each place attends to each word come after those of the blocks, a map per
            resolution, with a channel per word.

    Raises:
        FileNotFoundError, ImportError, ValueError: no such file, no generator of colour images, or no such block, time,
            label or attention; diffusers is absent.
    """

    info: list[FeatureInfo]  # of the maps that it gives, with strides in pixels of the image
    multiple: int  # images' sides must be multiples of it
    noise: Tensor  # (C, side, side), the tile

    def __init__(
        self,
        generator: DiffusionModel | UNet | str | Path,
        blocks: Sequence[int | str],
        timesteps: Sequence[float] = (50,),
        label: int | None = None,
        noise_side: int = 256,
        seed: int = 0,
        attention: bool = False,
    ) -> None:
        super().__init__()
        model = load_generator(generator, named_blocks=any(isinstance(block, str) for block in blocks))
        if model.space.image_channels != 3:
            raise ValueError(f"features need colour images, but this UNet takes {model.space.image_channels} channels")
        model.info_of(blocks)  # ValueError if one does not exist
        if not timesteps:
            raise ValueError("name at least one timestep")
        self.levels = model.schedule.levels(timesteps)
        if label is not None and model.classes and label not in range(len(model.classes) + model.has_absent):
            raise ValueError(f"this UNet has classes: give it a label from 0 to {len(model.classes) - 1}, not {label}")
        self.said = None if label is None else torch.tensor([label], device="cpu")
        condition = model.condition(self.said)  # ValueError if this is nothing that the model has learned
        self.generator, self.multiple = model, model.stride
        self.blocks, self.timesteps = list(blocks), list(timesteps)
        self.record(generator=model, blocks=self.blocks, timesteps=self.timesteps)
        self.read_blocks = [*blocks, *(model.network.attention_blocks(blocks) if attention else [])]
        info = model.info_of(self.read_blocks, condition)
        named = [
            (f"t{t:g} {block if isinstance(block, str) else f'block {block}'}")
            for t in timesteps
            for block in self.read_blocks
        ]
        if len(set(named)) < len(named):
            raise ValueError(
                f"name each block and each timestep once, to six digits, not {self.blocks} and {self.timesteps}"
            )
        self.info = [replace(about, name=name) for name, about in zip(named, [*info] * len(timesteps), strict=True)]
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
        condition = self.generator.condition(self.said)
        told = None if condition is None else condition.expand(signal.shape[0])
        maps: list[Tensor] = []
        for alpha, sigma, time in self.levels:
            noisy = (alpha * signal + sigma * noise).to(self.generator.dtype)
            times = torch.full(signal.shape[:1], time, device=signal.device)
            maps += self.generator.activations(noisy, times, self.read_blocks, told)
        return maps

    def unused(self) -> list[torch.nn.Parameter]:
        """The network's parameters that no map depends on."""
        return self.generator.network.unused(self.read_blocks)
