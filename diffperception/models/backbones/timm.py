"""Any timm model as a backbone, by its name."""

import difflib
import inspect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from timm.models import group_parameters
from timm.models.resnet import BasicBlock, Bottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor
from torchvision.ops.misc import FrozenBatchNorm2d

from diffperception.models.backbones.base import Backbone, numbered
from diffperception.models.backbones.weights import load_weights, plain_name
from diffperception.models.base import require_not_named_by_a_file
from diffperception.models.feature_info import FeatureInfo
from diffperception.models.ops.convolution import fold_norm


class TimmBackbone(Backbone):
    """The feature maps of a timm model; those of a Swin are layer-normalised, as its detectors do.

    Args:
        name: timm model name, for example `resnet50` or `swin_base_patch4_window7_224`.
        strides: of the maps to return, finest first; the model must offer them.
        pretrained: load timm's weights (needs the network once).
        freeze_norm: use batch norm with fixed statistics and weights, as fine-tuning with small batches does.
        backbone_weights: a file with weights under timm's names (safetensors, .pth), instead of those from the network.

    Attributes:
        weights_taken: what was taken of such a file, in words; empty without one.

    Raises:
        FileNotFoundError: there is no such file of weights.
        ValueError: no such model, or it has no feature map at one of the strides; or the weights of the file do not fit
            it, which are named.
    """

    weights_taken: str = ""

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        pretrained: bool = False,
        freeze_norm: bool = False,
        backbone_weights: str | Path | None = None,
    ):
        super().__init__()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "`timm.list_models()` names all"
            raise ValueError(f"timm has no model {name!r}: {hint}")
        self.name = name
        # Swins are built for one image size unless told otherwise, and do not shift windows as large as its maps.
        swin = name.startswith("swin")
        any_size: dict[str, Any] = {"strict_img_size": False, "always_partition": True} if swin else {}
        with torch.device("meta"):
            probe: Any = timm.create_model(name, features_only=True, **any_size)
        if "dynamic_img_size" in inspect.signature(type(getattr(probe, "model", probe))).parameters:
            any_size = {"dynamic_img_size": True}  # so are ViTs
        offered = probe.feature_info.reduction()
        missing = [stride for stride in strides if stride not in offered]
        if missing:
            raise ValueError(f"backbone {name} has feature maps at strides {offered}, not at {missing}")
        # Where several maps have a stride, as all of a transformer of one, the last is the deepest.
        last = dict(zip(offered, probe.feature_info.out_indices, strict=True))
        keep = [last[stride] for stride in strides]
        fetch = pretrained and backbone_weights is None
        model: Any = timm.create_model(name, pretrained=fetch, features_only=True, out_indices=keep, **any_size)
        if backbone_weights is not None:
            require_not_named_by_a_file(backbone_weights)
            self.weights_taken = load_weights(model, self._network(), Path(backbone_weights))
        self.body: nn.Module = freeze_batch_norm_2d(model) if freeze_norm else model
        self.info = [
            FeatureInfo(f"stride {stride}", channels, stride)
            for stride, channels in zip(strides, model.feature_info.channels(), strict=True)
        ]
        self.record(pretrained=False, backbone_weights=None)  # loading brings its own weights
        self.channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        if self.channels_last:  # Swins, whose residual stream nothing has normalised yet
            self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
        for module in self.body.modules():
            if isinstance(module, SwinTransformerBlock):
                module.__class__ = PaddedSwinBlock
            elif isinstance(module, FrozenBatchNorm2d):
                module.__class__ = FusedFrozenBatchNorm2d
        for conv, norm in _norms_of_a_resnet(self.body):
            fold_norm(conv, norm)

    def layers(self, stages: bool = False) -> dict[str, int]:
        """See `Backbone.layers`: blocks or stages as timm groups them; the norms of the maps are of the last."""
        network = self._network()
        if not hasattr(network, "group_matcher"):
            return super().layers(stages)
        groups = group_parameters(network, network.group_matcher(coarse=stages), reverse=True)
        by_name = {plain_name(name): number for name, number in groups.items()}
        found = {f"body.{name}": by_name.get(plain_name(name)) for name, _ in self.body.named_parameters()}
        return numbered({name: found.get(name) for name, _ in self.named_parameters()})

    def _network(self) -> Any:
        """The whole network that the body is a part of, without numbers in its weights."""
        with torch.device("meta"):
            return timm.create_model(self.name)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> one (B, channels[l], H / strides[l], W / strides[l]) a level."""
        maps = self.body(images)
        if not self.channels_last:
            return maps
        return [norm(m).permute(0, 3, 1, 2) for norm, m in zip(self.norms, maps, strict=True)]


class PaddedSwinBlock(SwinTransformerBlock):
    """A Swin block that pads a map to whole windows before it shifts them, as the original does (arXiv 2103.14030).

    timm shifts first, so that in maps of other sizes the padding comes to lie between neighbours.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]  # (B, H, W, C)
        padded = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(padded)[:, :height, :width]


class FusedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """torchvision's frozen batch norm in one pass over the map instead of two: a ResNet-50 takes 15 % less time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def _norms_of_a_resnet(body: nn.Module) -> Iterator[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """The convolutions of a ResNet and the frozen norms that their maps go to; none of another network."""
    blocks = [module for module in body.modules() if isinstance(module, (BasicBlock, Bottleneck))]
    shortcuts = [block.downsample for block in blocks if block.downsample is not None]
    for part in [body, *blocks, *shortcuts] if blocks else []:
        for conv, norm in itertools.pairwise(part.children()):
            if type(conv) is nn.Conv2d and isinstance(norm, FrozenBatchNorm2d):
                yield conv, norm


def build_backbone(
    backbone: str | Backbone,
    strides: Sequence[int],
    pretrained: bool = False,
    freeze_norm: bool = False,
    backbone_weights: str | Path | None = None,
) -> Backbone:
    """A timm model by its name, or the backbone already built; ValueError if that has other strides.

    Errors of a file of weights are those of `TimmBackbone`; ValueError too if it is for a backbone already built.
    """
    if isinstance(backbone, str):
        return TimmBackbone(backbone, strides, pretrained, freeze_norm, backbone_weights)
    if backbone_weights is not None:
        raise ValueError(
            f"backbone_weights {backbone_weights} are for a timm model that is given by its name, but the backbone is a"
            f" {type(backbone).__name__} already built: leave them out"
        )
    if backbone.strides != list(strides):
        raise ValueError(
            f"the {type(backbone).__name__} gives maps at strides {backbone.strides}, not {list(strides)}: set the"
            f" detector's strides to {backbone.strides}"
        )
    return backbone


def loaded_weights(model: nn.Module) -> list[str]:
    """What the timm models in a model took of files of weights, a sentence each."""
    return [
        module.weights_taken for module in model.modules() if isinstance(module, TimmBackbone) and module.weights_taken
    ]
