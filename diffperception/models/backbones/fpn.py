"""The feature pyramid over a backbone's maps."""

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from diffperception.models.backbones.base import Backbone
from diffperception.models.ops.convolution import Conv3x3


class FPN(nn.Module):
    """Lateral 1x1 convolutions, top-down sums, 3x3 convolutions (arXiv 1612.03144) over a backbone's maps.

    ValueError if the backbone's strides are not each twice the one before.
    """

    def __init__(self, backbone: Backbone, width: int = 256, norm: bool = False):
        super().__init__()
        self.backbone = backbone
        self.strides = backbone.strides
        require_doubling(self.strides)
        self.width = width
        self.fpn = FeaturePyramidNetwork(backbone.channels, width, norm_layer=nn.BatchNorm2d if norm else None)
        for output, *_ in self.fpn.layer_blocks:
            output.__class__ = Conv3x3

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one (B, width, H / strides[l], W / strides[l]) a level, finest first."""
        maps = self.backbone(images)
        return list(self.fpn({str(i): m for i, m in enumerate(maps)}).values())


def require_doubling(strides: Sequence[int]) -> None:
    """ValueError unless each of the strides is twice the one before, and there are some."""
    if not strides or list(strides) != [strides[0] * 2**level for level in range(len(strides))]:
        raise ValueError(f"the strides {list(strides)} are no pyramid's: give some, each twice the one before")


def build_pyramid(backbone: Backbone, width: int, norm: bool = False) -> nn.Module:
    """Maps of one width over a backbone's: an FPN, or the backbone itself where its maps are such a pyramid."""
    if backbone.is_pyramid and set(backbone.channels) == {width}:
        return backbone
    return FPN(backbone, width, norm)
