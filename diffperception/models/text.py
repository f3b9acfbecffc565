"""Texts as tokens: their words, and a small transformer that reads them."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.models.unet.blocks import MultiheadAttention

# Characters that are words of their own: ideographs, and the kana beside them.
IDEOGRAPH = "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
LETTERS = rf"(?:(?!{IDEOGRAPH})[^\W_])+"
WORD = re.compile(rf"{IDEOGRAPH}|{LETTERS}(?:['\u2019]{LETTERS})*")
Activation = Literal["gelu", "quick_gelu"]


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters and without punctuation; Chinese by characters.

    >>> words_of("A red star, 红色")
    ['a', 'red', 'star', '红', '色']
    """
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def vocabulary_of(texts: Iterable[str], min_count: int = 1) -> tuple[list[str], int]:
    """The words that occur in texts so often, sorted; and how many words the longest text has."""
    counts, longest = Counter[str](), 0
    for text in texts:
        words = words_of(text)
        counts.update(words)
        longest = max(longest, len(words))
    return sorted(word for word, count in counts.items() if count >= min_count), longest


class TextEncoder(nn.Module):
    """A transformer over the tokens of a text, normed before its layers.

    With ``causal`` and quick_gelu it is the text tower of CLIP (arXiv 2103.00020), as in Stable Diffusion 1.

    Args:
        vocabulary: how many tokens there are.
        width: D of a token.
        depth: layers.
        num_heads: heads of an attention.
        length: tokens in a text at most.
        causal: a token attends to those before it alone.
        activation: gelu, or quick_gelu, x sigmoid(1.702 x).
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        num_heads: int,
        length: int,
        causal: bool = False,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(TextBlock(width, num_heads, activation) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens (B, L) int64, of which ``mask`` (B, L) bool counts some -> (B, L, D)."""
        length = ids.shape[1]
        x = self.embedding(ids) + self.positions[:length]
        seen = None if mask is None else mask[:, None, None]
        if self.causal:
            earlier = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
            seen = earlier if seen is None else earlier & seen
        for block in self.blocks:
            x = block(x, seen)
        return self.norm(x)


class TextBlock(nn.Module):
    """Attention among the tokens, and a layer on each, both normed before and added."""

    def __init__(self, width: int, num_heads: int, activation: Activation) -> None:
        super().__init__()
        self.quick = activation == "quick_gelu"
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiheadAttention(width, num_heads, width, bias=True)
        self.wide = nn.Linear(width, 4 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm1(x)
        x = x + self.attention(h, h, mask)
        h = self.wide(self.norm2(x))
        return x + self.out(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))
