"""The half of the ADM UNet that reads the noisy image: stem, encoder and middle (arXiv 2105.05233)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffperception.models.base import Model
from diffperception.models.unet.blocks import (
    NORM_GROUPS,
    Attention,
    Downsample,
    ResBlock,
    Stage,
    Upsample,
    time_embedding,
)

Resampling = Literal["block", "conv", "pool"]


class Encoder(Model):
    """What the UNet and the noisy classifier share.

    Args:
        in_channels: channels of the image.
        channels: width that the time's sinusoids have.
        layers: makes the layers.
        widths: width of each level, from :func:`level_widths`.
        num_res_blocks: residual blocks a level.
        checkpointing: recompute activations in the backward pass instead of keeping them.

    Attributes:
        stride: how many input pixels wide a pixel of the innermost level is.
        skip_widths: channels of the stem's map and of each stage's.

    Raises:
        ValueError: if a number is not above 0, or heads do not divide a width.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: "Layers",
        widths: list[int],
        num_res_blocks: int,
        checkpointing: bool,
    ) -> None:
        super().__init__()
        require_positive(
            {
                "in_channels": in_channels,
                "channels": channels,
                "num_res_blocks": num_res_blocks,
                "num_heads": layers.num_heads,
                "num_head_channels": layers.num_head_channels,
            }
        )
        self.in_channels = in_channels
        self.channels = channels
        self.checkpointing = checkpointing
        self.stride = 2 ** (len(widths) - 1)
        self.embedding = embedding = layers.embedding
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.encoder, self.skip_widths = _encoder(layers, widths, num_res_blocks)
        self.middle = layers.middle(widths[-1])

    def embed(self, x: Tensor, t: Tensor) -> Tensor:
        """The embedding (B, E) of times (B,), in the dtype of ``x``, before its activation."""
        return self.time_embed(time_embedding(t, self.channels).to(x.dtype))

    def encode(self, x: Tensor, emb: Tensor) -> Iterator[Tensor]:
        """The maps of the stem, of each stage and of the middle, from (B, C, H, W) and the activated embedding (B, E).

        Raises:
            ValueError: for a size that does not halve evenly, or another number of channels.
        """
        self._check_image(x)
        # Convolutions of the CPU are fastest on pixels whose channels lie together; group norm of the GPU is not.
        h = self.stem(x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x)
        yield h
        for stage in (*self.encoder, self.middle):
            h = self._run(stage, h, emb)
            yield h

    def _run(self, stage: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, use_reentrant=False)
        return stage(h, emb)

    def _check_image(self, x: Tensor) -> None:
        _, channels, height, width = x.shape
        if channels != self.in_channels:
            raise ValueError(f"This {type(self).__name__} takes images of {self.in_channels} channels, not {channels}.")
        self.check_size(height, width)

    def check_size(self, height: int, width: int) -> None:
        """ValueError if images of this size do not halve evenly between levels; it says which would do."""
        require_positive({"height": height, "width": width})
        if height % self.stride or width % self.stride:
            smaller, larger = ([_round(side, self.stride, up) for side in (height, width)] for up in (0, 1))
            crop = f"crop to {smaller[0]} x {smaller[1]} or " if all(smaller) else ""
            raise ValueError(
                f"This {type(self).__name__} halves images to 1/{self.stride}, which {height} x {width} pixels do not "
                f"allow; {crop}pad to {larger[0]} x {larger[1]}."
            )


@dataclass(frozen=True)
class Layers:
    """Makes the layers, all of one kind."""

    embedding: int
    attention: Sequence[int]
    num_heads: int | None
    num_head_channels: int
    dropout: float
    scale_shift: bool
    resampling: Resampling

    def residual(self, width_in: int, width: int, resample: Literal["down", "up"] | None = None) -> ResBlock:
        return ResBlock(width_in, width, self.embedding, self.dropout, self.scale_shift, resample)

    def heads_of(self, width: int) -> int:
        per_head = self.num_head_channels if self.num_heads is None else self.num_heads
        if width % per_head:
            name = "num_head_channels" if self.num_heads is None else "num_heads"
            raise ValueError(f"A level {width} channels wide cannot be split evenly by {name} = {per_head}.")
        return width // per_head if self.num_heads is None else per_head

    def attend(self, width: int) -> Attention:
        return Attention(width, self.heads_of(width))

    def stage(self, width_in: int, width: int, factor: int) -> list[nn.Module]:
        attends = [self.attend(width)] if factor in self.attention else []
        return [self.residual(width_in, width), *attends]

    def middle(self, width: int) -> Stage:
        return Stage([self.residual(width, width), self.attend(width), self.residual(width, width)])

    def down(self, width: int) -> nn.Module:
        if self.resampling == "block":
            return self.residual(width, width, "down")
        return Downsample(width, learned=self.resampling == "conv")

    def up(self, width: int) -> nn.Module:
        if self.resampling == "block":
            return self.residual(width, width, "up")
        return Upsample(width, learned=self.resampling == "conv")


def _encoder(layers: Layers, widths: list[int], num_res_blocks: int) -> tuple[nn.ModuleList, list[int]]:
    """The encoder's stages, and the widths that the stem and they hand to the decoder."""
    width = widths[0]
    stages, skips = nn.ModuleList(), [width]
    for level, level_width in enumerate(widths):
        for _ in range(num_res_blocks):
            stages.append(Stage(layers.stage(width, level_width, 2**level)))
            skips.append(width := level_width)
        if level < len(widths) - 1:
            stages.append(Stage([layers.down(width)]))
            skips.append(width)
    return stages, skips


def level_widths(channels: int, channel_mult: Sequence[float], attention: Sequence[int]) -> list[int]:
    """The width of each level.

    Raises:
        ValueError: if there is none, one is not a multiple of the norms' groups, or no level has a factor in
            ``attention``.
    """
    widths = [round(channels * multiplier) for multiplier in channel_mult]
    if not widths or any(width % NORM_GROUPS or width < 1 for width in widths):
        raise ValueError(
            f"There must be a level, and every level's width a multiple of {NORM_GROUPS}; channels x channel_mult are"
            f" {widths}."
        )
    factors = [2**level for level in range(len(widths))]
    if not set(attention) <= set(factors):
        raise ValueError(f"The levels' downsampling factors are {factors}; `attention` names {list(attention)}.")
    return widths


def require_positive(numbers: Mapping[str, int | None]) -> None:
    """ValueError naming the first that is given and not above 0."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be above 0, not {number}")


def _round(side: int, multiple: int, up: int) -> int:
    return (side // multiple + (up if side % multiple else 0)) * multiple
