"""The activations of a diffusion UNet as a detector's feature maps (label-efficient use: arXiv 2112.03126)."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffperception import weights
from diffperception.diffusion import DiscreteSchedule, Schedule, linear_schedule
from diffperception.models.backbone import Backbone
from diffperception.models.blocks import NORM_GROUPS
from diffperception.models.normalization import group_norm
from diffperception.models.unet import UNet

NOISE_TILE = 256


class UNetBackbone(Backbone):
    """The normalised activations of a diffusion UNet's decoder, which sees images at one noise level.

    The noise is the same for every image, in training too: a tile from a fixed seed, repeated from the upper left
    corner. So a pixel's noise depends neither on its batch nor on how far the image was padded. What follows the last
    block is not computed.

    Args:
        unet: file of a saved UNet or DiffusionModel, or such a model. A UNet alone was trained on the linear schedule
            of 1000 steps; a DiffusionModel knows its own.
        blocks: decoder blocks to read, as `UNet.block_info` counts them: one a stride, each stride twice the next.
        timestep: noise level that the UNet is told and images are brought to, from 0.
        frozen: leave the UNet as it is: in evaluation mode, without gradients; else it is fine-tuned.
        label: the class that a UNet with classes is told; if it has an absent one, that is the last.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such model, or the other arguments do not fit it; the message says what would.
    """

    mean = (0.5, 0.5, 0.5)  # the UNet's images are -1..1
    std = (0.5, 0.5, 0.5)
    noise: Tensor

    def __init__(
        self,
        unet: str | Path | nn.Module,
        blocks: Sequence[int],
        timestep: int = 50,
        frozen: bool = True,
        label: int | None = None,
    ):
        super().__init__()
        model = unet if isinstance(unet, nn.Module) else weights.load_model(unet)
        network = getattr(model, "unet", model)  # of a DiffusionModel, or itself
        if not isinstance(network, UNet):
            raise ValueError(f"a {type(model).__name__} has no activations to read: give a UNet or DiffusionModel")
        _require_fit(network, label)
        self.unet = network
        self.blocks = _finest_first(network, blocks)
        self.arguments: dict[str, Any] = {
            "unet": model,
            "blocks": self.blocks,
            "timestep": timestep,
            "frozen": frozen,
            "label": label,
        }
        self.channels = [self.unet.block_info[block].channels for block in self.blocks]
        self.strides = [self.unet.block_info[block].stride for block in self.blocks]
        self.multiple = self.unet.stride
        self.alpha, self.sigma = _signal_and_noise(getattr(model, "schedule", linear_schedule()), timestep)
        self.timestep = timestep
        self.frozen = frozen
        self.label = label
        # The residual stream grows from block to block, and nothing has normalised it yet.
        self.norms = nn.ModuleList(nn.GroupNorm(NORM_GROUPS, channels) for channels in self.channels)
        tile = torch.randn(1, 3, NOISE_TILE, NOISE_TILE, generator=torch.Generator().manual_seed(0), device="cpu")
        self.register_buffer("noise", tile, persistent=False)
        unused = [*self.unet.decoder[max(blocks) + 1 :], self.unet.out_norm, self.unet.out_conv]
        for module in [self.unet] if frozen else unused:
            module.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "UNetBackbone":
        """As of every module, but a frozen UNet stays in evaluation mode."""
        super().train(mode)
        self.unet.train(mode and not self.frozen)
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> one (B, channels[l], H / strides[l], W / strides[l]) a level."""
        batch, _, height, width = images.shape
        repeats = [-(-side // NOISE_TILE) for side in (height, width)]
        noise = self.noise.repeat(1, 1, *repeats)[:, :, :height, :width]
        t = torch.full((batch,), self.timestep, device=images.device)
        labels = None if self.label is None else torch.full_like(t, self.label)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self.unet.activations(self.alpha * images + self.sigma * noise, t, self.blocks, labels)
        return [group_norm(norm, m) for norm, m in zip(self.norms, maps, strict=True)]  # type: ignore[arg-type]


def _finest_first(unet: UNet, blocks: Sequence[int]) -> list[int]:
    """The blocks from the last to the first; ValueError if a pyramid cannot be built on them."""
    offered = "; ".join(
        f"stride {stride}: {', '.join(str(block.index) for block in members)}"
        for stride, members in groupby(unet.block_info, lambda block: block.stride)
    )
    unknown = [block for block in blocks if block not in range(len(unet.block_info))]
    if unknown or not blocks:
        raise ValueError(f"this UNet has no decoder blocks {unknown or list(blocks)}; it has {offered}")
    ordered = sorted(blocks, reverse=True)
    strides = [unet.block_info[block].stride for block in ordered]
    if strides != [strides[0] * 2**level for level in range(len(strides))]:
        raise ValueError(
            f"blocks {ordered} have strides {strides}, but a pyramid needs one a stride, each twice the one before;"
            f" this UNet has {offered}"
        )
    return ordered


def _require_fit(unet: UNet, label: int | None) -> None:
    """ValueError if the UNet does not take colour images, or not this label."""
    if unet.in_channels != 3:
        raise ValueError(f"this UNet takes images of {unet.in_channels} channels; a detector's have 3")
    if label is not None and unet.num_classes is None:
        raise ValueError("this UNet has no classes: leave the label out")
    if unet.num_classes is not None and label not in range(unet.num_classes):
        raise ValueError(f"this UNet has classes: give it a label from 0 to {unet.num_classes - 1}, not {label}")


def _signal_and_noise(schedule: Schedule, timestep: int) -> tuple[float, float]:
    """alpha and sigma where a UNet is told `timestep`; ValueError if it is told no such time."""
    discrete = isinstance(schedule, DiscreteSchedule)
    steps = schedule.num_timesteps if isinstance(schedule, DiscreteSchedule) else 1000
    if timestep not in range(steps):
        raise ValueError(f"timestep {timestep} is not one of this UNet's: choose 0 to {steps - 1}")
    time = timestep if discrete else timestep / steps  # a straight path's time is 0..1, and told as 0..1000
    return float(schedule.alpha(time)), float(schedule.sigma(time))
