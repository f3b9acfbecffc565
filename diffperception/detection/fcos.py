"""torchvision's FCOS (arXiv 1904.01355) behind our interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from torchvision.models.detection import fcos
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from diffperception.detection.baseline import ExactAnchors, Pyramid, TorchvisionDetector
from diffperception.models import Backbone, build_backbone


class FCOS(TorchvisionDetector):
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
        body = build_backbone(backbone, strides, pretrained, freeze_norm, backbone_weights)
        levels = [strides[0] * 2**i for i in range(len(strides) + 2)]
        model = fcos.FCOS(
            Pyramid(body, width, fpn_norm, LastLevelP6P7(width, width)),
            num_classes=len(self.classes),
            anchor_generator=ExactAnchors(tuple((s,) for s in levels), ((1.0,),) * len(levels)),
            detections_per_img=max_detections,
        )
        self._adopt(model, body)
