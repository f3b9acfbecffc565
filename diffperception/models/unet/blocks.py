"""The parts of the ADM UNet (Diffusion Models Beat GANs, arXiv 2105.05233): residual blocks, attention, resampling."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

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


class Told(NamedTuple):
    """What every layer of a network is told."""

    emb: Tensor  # (B, E) the activated embedding of time, and of what else is said as a whole
    tokens: Tensor | None = None  # (B, L, D) of words
    mask: Tensor | None = None  # (B, L) bool, which of the tokens count; all by default


class Stage(nn.ModuleList):
    """Layers in a row, each told the same."""

    def forward(self, x: Tensor, told: Told) -> Tensor:
        for layer in self:
            x = layer(x, told)
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

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W'); words are not used."""
        emb = told.emb
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
    """Self-attention over all positions of a map, added to it; its channels are a multiple of ``num_heads``.

    Where it is told words, their keys and values join those of the positions (GLIDE, arXiv 2112.10741, section 2.3).

    Args:
        channels: C of the map.
        num_heads: attention heads.
        norm: makes its norm.
        context: D of the words' tokens; None for an attention without words.
    """

    def __init__(self, channels: int, num_heads: int, norm: Norm, context: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))
        self.words = None if context is None else nn.Linear(context, 2 * channels)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(B, C, H, W) -> the same shape; the embedding is not used."""
        B, C, H, W = x.shape
        tokens = group_norm(self.norm, x).permute(0, 2, 3, 1).reshape(B, H * W, C)
        q, k, v = self.qkv(tokens).view(B, H * W, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        mask = None
        if self.words is not None:
            words = self.words(told.tokens).unflatten(2, (2, self.num_heads, C // self.num_heads))
            of_words = words.permute(2, 0, 3, 1, 4)  # keys and values (B, heads, L, C / heads)
            k, v = torch.cat([of_words[0], k], dim=2), torch.cat([of_words[1], v], dim=2)
            if told.mask is not None:
                mask = F.pad(told.mask, (0, H * W), value=True)[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(B, H, W, C)
        return x + self.out(mixed).permute(0, 3, 1, 2)


class SpatialTransformer(nn.Module):
    """A transformer over all positions of a map, added to it (latent diffusion, arXiv 2112.10752, appendix E.2.1).

    Args:
        channels: C of the map.
        num_heads: heads of its attentions.
        norm: makes the norm of the map.
        context: D of the words' tokens.
    """

    def __init__(self, channels: int, num_heads: int, norm: Norm, context: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, num_heads, context)
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(B, C, H, W) -> the same shape; the embedding is not used."""
        B, C, H, W = x.shape
        tokens = self.proj_in(group_norm(self.norm, x).permute(0, 2, 3, 1).reshape(B, H * W, C))
        return x + self.proj_out(self.block(tokens, told)).view(B, H, W, C).permute(0, 3, 1, 2)


class TransformerBlock(nn.Module):
    """Attention among positions, attention of positions to words, and a gated layer, each normed and added."""

    def __init__(self, channels: int, num_heads: int, context: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = MultiheadAttention(channels, num_heads, channels)
        self.cross_attention = MultiheadAttention(channels, num_heads, context)
        self.gate = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, told: Told) -> Tensor:
        """(B, N, C) -> the same shape."""
        h = self.norm1(x)
        x = x + self.self_attention(h, h)
        counted = None if told.mask is None else told.mask[:, None, None]
        x = x + self.cross_attention(self.norm2(x), told.tokens, counted)
        value, gate = self.gate(self.norm3(x)).chunk(2, dim=-1)
        return x + self.out(value * F.gelu(gate))


class MultiheadAttention(nn.Module):
    """Attention of queries to tokens.

    Args:
        channels: C of the queries and of the output, a multiple of num_heads.
        num_heads: heads.
        context: D of the tokens.
        bias: whether queries, keys and values have biases.
    """

    def __init__(self, channels: int, num_heads: int, context: int, bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(channels, channels, bias)
        self.k = nn.Linear(context, channels, bias)
        self.v = nn.Linear(context, channels, bias)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) and (B, L, D), of which a bool mask that fits (B, heads, N, L) counts some -> (B, N, C)."""
        q, k, v = (self._heads(layer(y)) for layer, y in ((self.q, x), (self.k, tokens), (self.v, tokens)))
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


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

    def forward(self, x: Tensor, told: Told) -> Tensor:
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
