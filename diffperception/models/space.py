"""The space that a diffusion model works in: pixels, or what an autoencoder makes of them."""

from abc import ABC, abstractmethod

from torch import Tensor

from diffperception.models.base import Model


class Space(Model, ABC):
    """From images to the signal that is noised, and back."""

    channels: int  # of the signal
    image_channels: int = 3  # 3 for colour, 1 for grey
    stride: int  # how many pixels of the image wide one cell of the signal is
    bounded: bool  # whether a signal lies in -1..1, so that predictions of it may be clipped

    @abstractmethod
    def compress(self, pixels: Tensor) -> Tensor:
        """Pixels (B, c, H, W) in -1..1 -> signal (B, C, H / stride, W / stride)."""

    @abstractmethod
    def expand(self, signal: Tensor) -> Tensor:
        """Signal (B, C, h, w) -> pixels (B, c, h * stride, w * stride), about -1..1."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, c, H, W) in 0..1 -> signal."""
        return self.compress(2 * images - 1)

    def decode(self, signal: Tensor) -> Tensor:
        """Signal -> images (B, c, H, W), 0..1."""
        return (self.expand(signal).clamp(-1, 1) + 1) / 2


class Pixels(Space):
    """The pixels themselves, -1..1.

    Args:
        channels: 3 for colour, 1 for grey.
    """

    stride = 1
    bounded = True

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.channels = self.image_channels = channels

    def compress(self, pixels: Tensor) -> Tensor:
        return pixels

    def expand(self, signal: Tensor) -> Tensor:
        return signal
