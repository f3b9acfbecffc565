"""Convolutions that compute what ``nn.Conv2d`` does, from the same weights, quicker on the CPU with channels last."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

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
        # The device first: questions about sizes would become guards on them where the model is exported.
        return (
            is_eager_cpu(x)
            and not torch.is_autocast_enabled("cpu")
            and x.dtype == self.weight.dtype == torch.float32
            and self.bias is not None
            and min(self.in_channels, self.out_channels) >= WIDTH
            and x.shape[2] % TILE == x.shape[3] % TILE == 0
            and len(x) * x.shape[2] * x.shape[3] >= PIXELS
        )


class FoldedConv2d(nn.Conv2d):
    """A convolution whose weights are scaled and shifted as the batch norm of fixed statistics after it would its maps.

    There are far fewer weights than there are numbers in the maps, and those need no copy for the backward pass.
    """

    frozen: tuple[FrozenBatchNorm2d]  # in a tuple, as it is no part of this module: it has its own name in the network

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        (norm,) = self.frozen
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = self.weight * factor[:, None, None, None]
        return self._conv_forward(x, weight, norm.bias - norm.running_mean * factor)


class FoldedNorm2d(FrozenBatchNorm2d):
    """A batch norm of fixed statistics that the convolution before it has done."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def fold_norm(conv: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    """Let a convolution without a bias do the work of the norm that its maps go to, and nothing else does.

    Names and weights stay as they are.
    """
    assert conv.bias is None
    conv.__class__, norm.__class__ = FoldedConv2d, FoldedNorm2d
    conv.frozen = (norm,)  # type: ignore[assignment]


class Conv1x1(nn.Conv2d):
    """A convolution of single pixels: on the CPU a linear layer, whose kernels are twice as fast."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        if not is_eager_cpu(x):
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def double(x: Tensor) -> Tensor:
    """Every pixel repeated in a square of 2 x 2."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def double_and_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``conv(double(x))`` of a 3 x 3 convolution; on the CPU with 4 instead of 9 products per output.

    Of the nine pixels under the kernel only four differ. A transposed convolution of stride 2 meets just those, if its
    kernel is the flipped one summed over each square of 2 x 2.
    """
    if not is_eager_cpu(x):
        return conv(double(x))
    flipped = conv.weight.flip(2, 3).transpose(0, 1)
    rows = F.pad(flipped, (0, 0, 0, 1)) + F.pad(flipped, (0, 0, 1, 0))
    return F.conv_transpose2d(x, F.pad(rows, (0, 1)) + F.pad(rows, (1, 0)), conv.bias, stride=2, padding=1)


def is_eager_cpu(x: Tensor) -> bool:
    """Whether to do what is quicker on a CPU: where the program is neither compiled, exported nor transformed."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # as by torch.func.jvp, of which our gradients know nothing
    )
