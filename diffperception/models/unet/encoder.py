"""The half of the ADM UNet that reads the noisy image: stem, encoder and middle (arXiv 2105.05233)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffperception.models.base import Model
from diffperception.models.feature_info import FeatureInfo
from diffperception.models.unet.blocks import (
    NORM_GROUPS,
    Attention,
    Direction,
    Resample,
    ResBlock,
    SpatialTransformer,
    Stage,
    Told,
    time_embedding,
)

Resampling = Literal["block", "conv", "pool"]
AttentionKind = Literal["added", "transformer"]
TRANSFORMER_EPS = 1e-6  # of the norm before a transformer, in latent diffusion


class Encoder(Model):
    """What the UNet and the noisy classifier share."""

    def __init__(self, layers: "Layers", checkpointing: bool) -> None:
        super().__init__()
        channels, embedding, widths = layers.channels, layers.embedding, layers.widths
        self.in_channels, self.channels, self.embedding = layers.in_channels, channels, embedding
        self.frequency_shift = layers.frequency_shift
        self.checkpointing = checkpointing
        self.stride = 2 ** (len(widths) - 1)  # how many input pixels wide a pixel of the innermost level is
        self.time_embed = nn.Sequential(nn.Linear(channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.encoder, self.skip_widths = layers.encoder()
        self.middle = layers.middle()

    def layers(self) -> dict[str, int]:
        """The number of the block of each parameter by its name, from the image on, from 0 on.

        The stem and the time's embedding are the first; what follows the last block is of that.
        """
        blocks = [*self.encoder, self.middle, *getattr(self, "decoder", [])]
        number = {id(p): i for i, block in enumerate(blocks, 1) for p in block.parameters()}
        first = {id(p) for module in (self.stem, self.time_embed) for p in module.parameters()}
        return {name: 0 if id(p) in first else number.get(id(p), len(blocks)) for name, p in self.named_parameters()}

    def embed(self, x: Tensor, t: Tensor) -> Tensor:
        """The embedding (B, E) of times (B,), in the dtype of ``x``, before its activation."""
        return self.time_embed(time_embedding(t, self.channels, self.frequency_shift).to(x.dtype))

    def encode(self, x: Tensor, told: Told) -> Iterator[Tensor]:
        """Maps of the stem, of each stage and of the middle, from images (B, C, H, W) and what layers are told."""
        self._check_image(x)
        # Convolutions of the CPU are fastest on pixels whose channels lie together; group norm of the GPU is not.
        h = self.stem(x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x)
        yield h
        for stage in (*self.encoder, self.middle):
            h = self._run(stage, h, told)
            yield h

    def _run(self, stage: nn.Module, h: Tensor, told: Told) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, h, told, use_reentrant=False)
        return stage(h, told)

    def _check_image(self, x: Tensor) -> None:
        _, channels, height, width = x.shape
        if channels != self.in_channels:
            raise ValueError(f"This {type(self).__name__} takes images of {self.in_channels} channels, not {channels}.")
        self.check_size(height, width)

    def check_size(self, height: int, width: int) -> None:
        """ValueError if images of this size do not halve evenly between levels; it says which would do."""
        require_positive({"height": height, "width": width})
        if height % self.stride or width % self.stride:
            smaller = [side // self.stride * self.stride for side in (height, width)]
            larger = [-(-side // self.stride) * self.stride for side in (height, width)]
            crop = f"crop to {smaller[0]} x {smaller[1]} or " if all(smaller) else ""
            raise ValueError(
                f"This {type(self).__name__} halves images to 1/{self.stride}, which {height} x {width} pixels do not "
                f"allow; {crop}pad to {larger[0]} x {larger[1]}."
            )


@dataclass(frozen=True)
class Layers:
    """Makes the layers of a UNet or noisy classifier from the arguments that they have in common."""

    in_channels: int
    channels: int
    channel_mult: Sequence[float]
    num_res_blocks: int
    attention: Sequence[int]
    num_heads: int | None
    num_head_channels: int
    dropout: float
    scale_shift: bool
    resampling: Resampling
    norm_groups: int = NORM_GROUPS
    norm_eps: float = 1e-5
    frequency_shift: int = 0
    one_sided_padding: bool = False
    context: int | None = None
    attention_kind: AttentionKind = "added"

    def __post_init__(self) -> None:
        widths = self.widths
        require_positive({"norm_groups": self.norm_groups})
        if not widths or any(width % self.norm_groups or width < 1 for width in widths):
            raise ValueError(
                f"There must be a level, and every level's width a multiple of {self.norm_groups}; channels x"
                f" channel_mult are {widths}."
            )
        factors = [2**level for level in range(len(widths))]
        if not set(self.attention) <= set(factors):
            raise ValueError(f"Downsampling factors are {factors}; `attention` names {list(self.attention)}.")
        counts = ("in_channels", "channels", "num_res_blocks", "num_heads", "num_head_channels", "context")
        require_positive({name: getattr(self, name) for name in counts})
        if self.frequency_shift and not 0 < self.frequency_shift < self.channels // 2:  # else no frequency is finite
            raise ValueError(
                f"frequency_shift must be 0 or above, and below half the {self.channels} channels, not"
                f" {self.frequency_shift}"
            )

        if self.attention_kind == "transformer" and self.context is None:
            raise ValueError(
                "attention_kind transformer attends to words: give context, how wide their tokens are, or take added"
            )

    @property
    def widths(self) -> list[int]:
        """The width of each level."""
        return [round(self.channels * multiplier) for multiplier in self.channel_mult]

    @property
    def embedding(self) -> int:
        return 4 * self.channels

    def encoder(self) -> tuple[nn.ModuleList, list[int]]:
        """The encoder's stages, and the widths of the maps that the stem and they hand to the decoder."""
        width = self.widths[0]
        stages, skips = nn.ModuleList(), [width]
        for level, level_width in enumerate(self.widths):
            for _ in range(self.num_res_blocks):
                stages.append(Stage(self.stage(width, level_width, 2**level)))
                skips.append(width := level_width)
            if level < len(self.widths) - 1:
                stages.append(Stage([self.resample(width, "down")]))
                skips.append(width)
        return stages, skips

    def decoder(self, skips: Sequence[int]) -> tuple[nn.ModuleList, list[FeatureInfo]]:
        """The decoder's stages and what they give, where the encoder hands it maps of these widths."""
        skips, width = list(skips), self.widths[-1]
        stages, info = nn.ModuleList(), []
        for level, level_width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                stage = self.stage(width + skips.pop(), level_width, 2**level)
                width = level_width
                rises = level > 0 and i == self.num_res_blocks
                info.append(FeatureInfo(f"block {len(stages)}", width, 2 ** (level - rises)))
                stages.append(Stage([*stage, self.resample(width, "up")] if rises else stage))
        return stages, info

    def middle(self) -> Stage:
        width = self.widths[-1]
        return Stage([self.residual(width, width), self.attend(width), self.residual(width, width)])

    def stage(self, width_in: int, width: int, factor: int) -> list[nn.Module]:
        attends = [self.attend(width)] if factor in self.attention else []
        return [self.residual(width_in, width), *attends]

    def norm(self, width: int) -> nn.GroupNorm:
        return nn.GroupNorm(self.norm_groups, width, self.norm_eps)

    def residual(self, width_in: int, width: int, resample: Direction | None = None) -> ResBlock:
        return ResBlock(width_in, width, self.embedding, self.dropout, self.scale_shift, self.norm, resample)

    def resample(self, width: int, direction: Direction) -> nn.Module:
        if self.resampling == "block":
            return self.residual(width, width, direction)
        return Resample(width, direction, self.resampling == "conv", self.one_sided_padding)

    def attend(self, width: int) -> nn.Module:
        if self.attention_kind == "transformer" and self.context is not None:
            norm = partial(nn.GroupNorm, self.norm_groups, eps=TRANSFORMER_EPS)
            return SpatialTransformer(width, self.heads_of(width), norm, self.context)
        return Attention(width, self.heads_of(width), self.norm, self.context)

    def heads_of(self, width: int) -> int:
        name = "num_head_channels" if self.num_heads is None else "num_heads"
        divisor = getattr(self, name)
        if width % divisor:
            raise ValueError(f"A level {width} channels wide cannot be split evenly by {name} = {divisor}.")
        return width // divisor if self.num_heads is None else divisor


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of a square's side, or of the two as they are."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def require_positive(numbers: Mapping[str, int | None]) -> None:
    """ValueError naming the first that is given and not above 0."""
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be above 0, not {number}")
