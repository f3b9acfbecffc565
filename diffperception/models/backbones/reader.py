"""The activations of a diffusion model's network as a detector's feature maps (arXiv 2112.03126)."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffperception.models.backbones.base import Backbone, numbered
from diffperception.models.feature_info import strides_in_words
from diffperception.models.generator import DiffusionModel, load_generator
from diffperception.models.ops.normalization import group_norm
from diffperception.models.reader import ActivationReader
from diffperception.models.unet.blocks import NORM_GROUPS
from diffperception.models.unet.unet import UNet


class UNetBackbone(Backbone):
    """The normalised activations of a diffusion UNet's decoder, which sees images at one noise level.

    The noise is the same for every image, in training too (:class:`ActivationReader`).

    Args:
        unet: a UNet, trained on the linear schedule of 1000 steps, a DiffusionModel, which knows its own, a file of one
            of them, or a folder of diffusers.
        blocks: blocks to read, as `block_info` counts them, or names of modules of a network of diffusers: one per
            stride, each stride twice the next.
        timestep: of the schedule, from 0: the noise level that images are brought to.
        frozen: the UNet stays as it is, in evaluation mode and without gradients; else it is fine-tuned.
        label: the class that a UNet with classes is told; by default none, if it has learned that.
        prompt: what a network that attends to words is told: a .safetensors file with `prompt_embeds`, or a text, for
            which transformers must be installed; by default zeros.
        keep_weights: the detector's file holds the frozen weights too, instead of naming where they lie; by default it
            holds those of our own files, and not those of diffusers' folders.

    Raises:
        FileNotFoundError, ImportError, ValueError: as the reader, or strides that are no pyramid's.
    """

    mean = (0.5, 0.5, 0.5)  # the generator's pixels are -1..1
    std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        unet: str | Path | DiffusionModel | UNet,
        blocks: Sequence[int | str],
        timestep: float = 50,
        frozen: bool = True,
        label: int | None = None,
        prompt: str | Path | None = None,
        keep_weights: bool | None = None,
    ):
        super().__init__()
        generator = load_generator(
            unet, prompt=prompt, keep_weights=keep_weights, named_blocks=any(isinstance(b, str) for b in blocks)
        )
        if not frozen and keep_weights is False:
            raise ValueError("keep_weights false leaves out frozen weights, and these are to be trained: set frozen")
        if not frozen:
            generator.network.keep_weights()  # they will be others
        infos = reversed(list(zip(generator.info_of(blocks), blocks, strict=True)))
        ordered = [block for _, block in sorted(infos, key=lambda pair: pair[0].stride)]
        self.reader = ActivationReader(generator, ordered, [timestep], label)
        self.record(unet=generator, blocks=ordered, prompt=None)
        self.info = self.reader.info
        if self.strides != [self.strides[0] * 2**level for level in range(len(ordered))]:
            raise ValueError(
                f"blocks {ordered} have strides {self.strides}, but a pyramid needs one per stride, each twice the one"
                f" before; this UNet has {strides_in_words(generator.block_info)}"
            )
        self.multiple = self.reader.multiple
        self.frozen = frozen
        # The residual stream grows from block to block, and nothing has normalised it yet.
        self.norms = nn.ModuleList(
            nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels) for channels in self.channels
        )
        generator.space.requires_grad_(False)
        for parameter in generator.parameters() if frozen else self.reader.unused():
            parameter.requires_grad_(False)
        self.train()

    def layers(self, stages: bool = False) -> dict[str, int]:
        """See `Backbone.layers`: each block of the UNet is one; the norms of the maps are of the last."""
        network = self.reader.generator.network
        inside = {f"reader.generator.network.{name}": number for name, number in network.layers().items()}
        return numbered({name: inside.get(name) for name, parameter in self.named_parameters()})

    def train(self, mode: bool = True) -> "UNetBackbone":
        """As every module's, but a frozen UNet stays in evaluation mode."""
        super().train(mode)
        self.reader.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> one (B, channels[l], H / strides[l], W / strides[l]) per level."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.reader.read(self.reader.generator.space.compress(images))
        return [group_norm(norm, m) for norm, m in zip(self.norms, maps, strict=True)]  # type: ignore[arg-type]
