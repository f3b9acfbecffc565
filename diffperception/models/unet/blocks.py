"""The parts of the ADM UNet (Diffusion Models Beat GANs, arXiv 2105.05233): residual blocks, attention, resampling."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.models.ops.convolution import Conv1x1, Conv3x3, double, double_and_convolve
from diffperception.models.ops.normalization import group_norm

NORM_GROUPS = 32
Direction = Literal["down", "up"]
Norm = Callable[[int], nn.GroupNorm]  # the group norm of so many channels


def time_embedding(t: Tensor, channels: int, frequency_shift: int = 0) -> Tensor:
    """Sinusoids of times (B,), cosines first -> (B, channels) float32 (arXiv 1706.03762, section 3.5).

    The k-th of K frequencies is 10000^(-k / (K - frequency_shift)).
    """
    half = channels // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / (half - frequency_shift))
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, channels % 2))


class Stage(nn.ModuleList):
    """Layers in a row, each told the time."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb)
        return x


class ResBlock(nn.Module):
    """Norm, SiLU, conv, then norm modulated by time, SiLU, dropout, conv, added to the (projected) input.

    Args:
        channels_in, channels: C of the input and C' of the output.
        embedding: E of the time embedding.
        dropout: share dropped before the second convolution.
        scale_shift: time scales and shifts the second norm's output; else it is added before that norm.
        norm: makes its norms.
        resample: ``down`` halves height and width before the first convolution and on the skip, ``up`` doubles them.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        embedding: int,
        dropout: float,
        scale_shift: bool,
        norm: Norm,
        resample: Direction | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = norm(channels_in)
        self.conv1 = Conv3x3(channels_in, channels)
        self.time = nn.Linear(embedding, 2 * channels if scale_shift else channels)
        self.norm2 = norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(Conv3x3(channels, channels))
        self.skip = nn.Identity() if channels_in == channels else Conv1x1(channels_in, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W) and the activated embedding (B, E) -> (B, C', H', W')."""
        x, h = self._first(x, group_norm(self.norm1, x, activate=True))
        if self.scale_shift:
            scale, shift = self.time(emb).chunk(2, dim=1)
            h = group_norm(self.norm2, h, scale, shift, activate=True)
        else:
            h = group_norm(self.norm2, h + self.time(emb)[:, :, None, None], activate=True)
        return self.skip(x) + self.conv2(self.dropout(h))

    def _first(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The skip and the first convolution, both at the new size."""
        if self.resample == "down":
            return F.avg_pool2d(x, 2), self.conv1(F.avg_pool2d(h, 2))
        if self.resample == "up":
            return double(x), double_and_convolve(h, self.conv1)
        return x, self.conv1(h)


class Attention(nn.Module):
    """Self-attention over all positions of a map, added to it; its channels are a multiple of ``num_heads``."""

    def __init__(self, channels: int, num_heads: int, norm: Norm) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape; the embedding is not used."""
        B, C, H, W = x.shape
        tokens = group_norm(self.norm, x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = self.qkv(tokens).view(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return x + self.out(mixed).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """Halves height and width by the mean of 2 x 2 pixels, or by a strided convolution if that is learned.

    ``up`` doubles them by repeating pixels, and convolves these if that is learned. The strided convolution pads all
    sides by one, or with ``one_sided`` the right and the lower alone (as TensorFlow does, and so DDPM's own code).
    """

    def __init__(self, channels: int, direction: Direction, learned: bool, one_sided: bool = False) -> None:
        super().__init__()
        self.down = direction == "down"
        self.one_sided = one_sided and self.down
        stride = 2 if self.down else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=0 if self.one_sided else 1) if learned else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.down:
            return (
                F.avg_pool2d(x, 2) if self.conv is None else self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)
            )
        return double(x) if self.conv is None else double_and_convolve(x, self.conv)


def zeroed(module: nn.Module) -> nn.Module:
    """The module with parameters of zero: a branch that starts by adding nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
