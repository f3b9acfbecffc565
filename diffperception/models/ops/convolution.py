"""Convolutions that hold what ``nn.Conv2d`` holds and compute the same, quicker on the CPU where channels are last."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffperception.models.ops.winograd import TILE, winograd

# Narrower maps spend in Winograd's transforms what they save in products, and so do small ones in transformed weights.
WIDTH, PIXELS = 64, 2048


class Conv3x3(nn.Conv2d):
    """A convolution of 3 x 3 pixels, padded by one: by Winograd's algorithm where that pays."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return winograd(x, self.weight, self.bias) if self._pays(x) else super().forward(x)  # type: ignore[arg-type]

    def _pays(self, x: Tensor) -> bool:
        B, _, H, W = x.shape
        return (
            min(self.in_channels, self.out_channels) >= WIDTH
            and H % TILE == W % TILE == 0
            and B * H * W >= PIXELS
            and x.dtype == self.weight.dtype == torch.float32
            and is_eager_cpu(x)
            and not torch.is_autocast_enabled("cpu")
        )


class Conv1x1(nn.Conv2d):
    """A convolution of single pixels: on the CPU a linear layer, whose kernels are twice as fast."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        if not is_eager_cpu(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def is_eager_cpu(x: Tensor) -> bool:
    """Whether what is faster on a CPU, and only where it is not compiled or exported, may be done."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
