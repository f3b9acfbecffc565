"""torchvision's FCOS (arXiv 1904.01355) behind our interface: the baseline that DiffusionDet is measured against."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models.detection import fcos
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from diffperception.detection.detector import Detector
from diffperception.detection.sampler import BoxSampler, to_image_pixels
from diffperception.detection.targets import image_sizes, without_crowds
from diffperception.models import Backbone, build_backbone


class FCOS(Detector):
    """FCOS on a timm backbone with FPN levels P3 to P7.

    Args:
        classes: names of the classes; label k is `classes[k]`.
        backbone: timm model name, or a backbone such as a UNetBackbone.
        pretrained: start from timm's ImageNet weights (needs the network once).
        backbone_weights: instead, start from the weights of a timm backbone in this file, under timm's names
            (safetensors, .pth); a classifier in it is left. The detector's file brings them itself.
        freeze_norm: batch norm of a timm backbone with fixed statistics.
        strides: of the backbone's maps that the pyramid uses, finest first; two coarser levels are added.
        width: channels of the pyramid; at least 64, a multiple of 32.
        fpn_norm: batch norm in the pyramid.
        max_detections: at most so many per image.
        min_size: images are resized for prediction so that their short side is this many pixels; null leaves them.
        max_size: but the long side is at most this.
    """

    class_layers: ClassVar = {"model.head.classification_head.cls_logits": 0}

    def __init__(
        self,
        classes: Sequence[str],
        backbone: str | Backbone = "resnet50",
        pretrained: bool = False,
        backbone_weights: str | Path | None = None,
        freeze_norm: bool = False,
        strides: Sequence[int] = (8, 16, 32),
        width: int = 256,
        fpn_norm: bool = False,
        max_detections: int = 100,
        min_size: int | None = 800,
        max_size: int | None = 1333,
    ):
        if width < 64 or width % 32:
            raise ValueError(f"FCOS needs a width of 64 or more, in multiples of 32 (its group norm), not {width}")
        super().__init__(classes, min_size, max_size)
        self.record(pretrained=False, backbone_weights=None)  # loading brings its own weights
        body = build_backbone(backbone, strides, pretrained, freeze_norm, backbone_weights)
        levels = [strides[0] * 2**i for i in range(len(strides) + 2)]
        self.model = fcos.FCOS(
            _Pyramid(body, width, fpn_norm),
            num_classes=len(self.classes),
            anchor_generator=AnchorGenerator(tuple((s,) for s in levels), ((1.0,),) * len(levels)),
            detections_per_img=max_detections,
        )
        self.model.transform = _NormaliseAndPad(
            min_size=1, max_size=1, image_mean=list(body.mean), image_std=list(body.std), size_divisible=body.multiple
        )

    def loss(
        self, images: list[Tensor], targets: list[dict], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Detector.loss`. Terms: `classification`, `bbox_regression`, `bbox_ctrness`."""
        training = self.model.training
        if not training:  # torchvision returns losses in training mode only
            self.model.train()
        learned = [without_crowds(target) for target in targets]
        objects = [_with_area({name: t[name].to(self.device) for name in ("boxes", "labels")}) for t in learned]
        losses = self.model([image.to(self.device) for image in images], objects)
        self.model.train(training)
        return losses

    @torch.no_grad()
    def predict(
        self, images: list[Tensor], seeds: Sequence[int] | None = None, sampler: BoxSampler | None = None
    ) -> list[dict[str, Tensor]]:
        """See `Detector.predict`; there is no noise to seed. Images go through one by one, unless `pad_together`."""
        if sampler is not None:
            raise ValueError("FCOS has no sampler: it predicts without one")
        resized = [self.resize(image.to(self.device)) for image in images]
        batches = [resized] if self.pad_together and images else [[image] for image in resized]
        detections = [found for batch in batches for found in self.model(batch)]
        seen, sizes = image_sizes(resized).to(self.device), image_sizes(images).to(self.device)
        for found, *size in zip(detections, seen, sizes, strict=True):
            found |= {"boxes": to_image_pixels(found["boxes"].float(), *size), "scores": found["scores"].float()}
        return [_with_area(found) for found in detections]


class _NormaliseAndPad(GeneralizedRCNNTransform):
    """torchvision's transform without its resizing, which our data transforms and `Detector.resize` do."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class _Pyramid(nn.Module):
    """P3 to P7 as torchvision's detectors want them: an ordered dict of maps, and `out_channels`."""

    def __init__(self, backbone: Backbone, width: int, norm: bool):
        super().__init__()
        self.backbone = backbone
        self.out_channels = width
        self.fpn = FeaturePyramidNetwork(
            backbone.channels, width, LastLevelP6P7(width, width), nn.BatchNorm2d if norm else None
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.backbone(images.to(next(self.parameters()).dtype))
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


def _with_area(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Objects or detections without those whose box has no area."""
    keep = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1)
    return {name: values[keep] for name, values in found.items()}
