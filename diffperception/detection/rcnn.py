"""torchvision's Faster R-CNN (arXiv 1506.01497) and Mask R-CNN (arXiv 1703.06870) behind our interface."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchvision.models.detection import faster_rcnn, mask_rcnn
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from diffperception.detection.baseline import ExactAnchors, Pyramid, TorchvisionDetector
from diffperception.models import Backbone, build_backbone
from diffperception.models.backbones.fpn import require_doubling

ANCHOR_CELLS = 8  # side of an anchor in cells of its level, and its aspects, as in torchvision's defaults
ASPECTS = (0.5, 1.0, 2.0)
BOX_BINS, MASK_BINS = 7, 14  # per side of what is pooled in a box for its class and corners, and for its mask
MASK_LAYERS = 4


class FasterRCNN(TorchvisionDetector):
    """Faster R-CNN on a timm backbone with an FPN and one coarser level, which has proposals but is not pooled from.

    Args:
        classes: names of the classes; label k is `classes[k]`.
        backbone: timm model name, or a backbone such as a UNetBackbone.
        strides: of the backbone's maps that the pyramid uses, finest first, each twice the one before.
        width: channels of the pyramid.
        fpn_norm: batch norm in the pyramid.
        head_width: channels of the two layers that see what is pooled in a proposal.
        proposals: at most so many per level and per image; twice as many in training.
        train_proposals: of them so many per image are learned from, a quarter at most of objects.
        max_detections: at most so many per image.
        pretrained: start from timm's ImageNet weights (needs the network once).
        backbone_weights: instead, start from the weights of a timm backbone in this file, under timm's names
            (safetensors, .pth); a classifier in it is left. The detector's file brings them itself.
        freeze_norm: batch norm of a timm backbone with fixed statistics.
        min_size: images are resized for prediction so that their short side is this many pixels; null leaves them.
        max_size: but the long side is at most this.
    """

    first_label = 1

    def __init__(
        self,
        classes: Sequence[str],
        backbone: str | Backbone = "resnet50",
        strides: Sequence[int] = (4, 8, 16, 32),
        width: int = 256,
        fpn_norm: bool = False,
        head_width: int = 1024,
        proposals: int = 1000,
        train_proposals: int = 512,
        max_detections: int = 100,
        pretrained: bool = False,
        backbone_weights: str | Path | None = None,
        freeze_norm: bool = False,
        min_size: int | None = 800,
        max_size: int | None = 1333,
    ):
        super().__init__(classes, min_size, max_size)
        body = build_backbone(backbone, strides, pretrained, freeze_norm, backbone_weights)
        require_doubling(body.strides)
        levels = [ANCHOR_CELLS * stride for stride in (*strides, 2 * strides[-1])]
        model = faster_rcnn.FasterRCNN(
            Pyramid(body, width, fpn_norm, LastLevelMaxPool()),
            rpn_anchor_generator=ExactAnchors(tuple((s,) for s in levels), (ASPECTS,) * len(levels)),
            box_roi_pool=_pooling(strides, BOX_BINS),
            box_head=faster_rcnn.TwoMLPHead(BOX_BINS**2 * width, head_width),
            box_predictor=faster_rcnn.FastRCNNPredictor(head_width, 1 + len(self.classes)),
            rpn_pre_nms_top_n_train=2 * proposals,
            rpn_post_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=proposals,
            rpn_post_nms_top_n_test=proposals,
            box_batch_size_per_image=train_proposals,
            box_detections_per_img=max_detections,
        )
        self._adopt(model, body)


class MaskRCNN(FasterRCNN):
    """Faster R-CNN with a mask of 28 x 28 in the box of each detection; its targets need `masks`."""

    gives_masks = needs_masks = True

    def _adopt(self, model: Any, body: Backbone) -> None:
        width, heads = model.backbone.out_channels, model.roi_heads
        heads.mask_roi_pool = _pooling(body.strides, MASK_BINS)
        heads.mask_head = mask_rcnn.MaskRCNNHeads(width, (width,) * MASK_LAYERS, 1)
        heads.mask_predictor = mask_rcnn.MaskRCNNPredictor(width, width, 1 + len(self.classes))
        super()._adopt(model, body)


def _pooling(strides: Sequence[int], bins: int) -> MultiScaleRoIAlign:
    """RoIAlign from the maps of the backbone's strides; the coarser one is only for proposals."""
    return MultiScaleRoIAlign([str(level) for level in range(len(strides))], bins, sampling_ratio=2)
