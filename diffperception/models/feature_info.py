"""What a feature map is, said once by whatever gives it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class FeatureInfo:
    """A feature map: its name, its channels, and how many pixels of the image wide one of its cells is."""

    name: str
    channels: int
    stride: int


def strides_in_words(info: Sequence[FeatureInfo]) -> str:
    """Which blocks there are of each stride, for messages."""
    numbered = groupby(enumerate(info), lambda pair: pair[1].stride)
    return "; ".join(f"stride {stride}: {', '.join(str(i) for i, _ in members)}" for stride, members in numbered)
