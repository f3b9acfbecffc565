"""What a feature map is, said once by whatever gives it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FeatureInfo:
    """A feature map: its name, its channels, and how many pixels of the image wide one of its cells is."""

    name: str
    channels: int
    stride: int
