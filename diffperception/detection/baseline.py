"""torchvision's detectors behind our interface: the baselines that DiffusionDet is measured against."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork

from diffperception.detection.detector import Detector
from diffperception.detection.sampler import BoxSampler, to_image_pixels
from diffperception.detection.targets import image_sizes, without_crowds
from diffperception.models import Backbone


class TorchvisionDetector(Detector):
    """A detector of torchvision on a backbone of ours; what derives from it gives its `model` to `_adopt`."""

    model: Any  # torchvision's, with its parts
    first_label: ClassVar[int] = 0  # torchvision's number of our class 0: 1 where its 0 is the background

    def _adopt(self, model: Any, body: Backbone) -> None:
        """Keep torchvision's detector, whose images are normalised and padded as the backbone wants them."""
        self.record(pretrained=False, backbone_weights=None)  # loading brings its own weights
        model.transform = _NormaliseAndPad(
            min_size=1, max_size=1, image_mean=list(body.mean), image_std=list(body.std), size_divisible=body.multiple
        )
        self.model = model

    def loss(
        self, images: list[Tensor], targets: list[dict], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Detector.loss`. Terms have torchvision's names; what it draws is of torch's global generator."""
        training = self.model.training
        if not training:  # torchvision returns losses in training mode only
            self.model.train()
        losses = self.model([image.to(self.device) for image in images], [self._objects(target) for target in targets])
        self.model.train(training)
        return {name.removeprefix("loss_"): value for name, value in losses.items()}

    def _objects(self, target: dict) -> dict[str, Tensor]:
        """What is learned of a target, with torchvision's labels."""
        names = ("boxes", "labels", *(["masks"] if self.needs_masks else []))
        if missing := set(names) - target.keys():
            raise ValueError(
                f"the targets of a {type(self).__name__} need {', '.join(sorted(missing))}: set data.masks: true"
            )
        learned = without_crowds(target)
        objects = _with_area({name: learned[name].to(self.device) for name in names})
        return objects | {"labels": objects["labels"] + self.first_label}

    @torch.no_grad()
    def predict(
        self, images: list[Tensor], seeds: Sequence[int] | None = None, sampler: BoxSampler | None = None
    ) -> list[dict[str, Tensor]]:
        """See `Detector.predict`; there is no noise to seed. Images go through one by one, unless `pad_together`."""
        if sampler is not None:
            raise ValueError(f"{type(self).__name__} has no sampler: it predicts without one")
        resized = [self.resize(image.to(self.device)) for image in images]
        batches = [resized] if self.pad_together and images else [[image] for image in resized]
        detections = [found for batch in batches for found in self.model(batch)]
        seen, sizes = image_sizes(resized).to(self.device), image_sizes(images).to(self.device)
        for found, *size in zip(detections, seen, sizes, strict=True):
            found |= {"boxes": to_image_pixels(found["boxes"].float(), *size), "scores": found["scores"].float()}
            found["labels"] = found["labels"] - self.first_label
        return [
            _with_whole_masks(_with_area(found), image.shape[-2:])
            for found, image in zip(detections, images, strict=True)
        ]


class _NormaliseAndPad(GeneralizedRCNNTransform):
    """torchvision's transform without its resizing before and after, which we do ourselves."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target

    def postprocess(self, result: list[dict[str, Tensor]], *sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        return result


class ExactAnchors(AnchorGenerator):
    """Anchors in float32 under autocast too: torchvision's have the type of the maps, and bfloat16 rounds pixels."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        exact = [m.to(torch.promote_types(m.dtype, torch.float32)) for m in feature_maps]
        return super().forward(image_list, exact)


class Pyramid(nn.Module):
    """Maps as torchvision's detectors want them: an ordered dict with coarser levels, and `out_channels`."""

    def __init__(self, backbone: Backbone, width: int, norm: bool, coarser: ExtraFPNBlock):
        super().__init__()
        self.backbone = backbone
        self.out_channels = width
        self.fpn = FeaturePyramidNetwork(backbone.channels, width, coarser, nn.BatchNorm2d if norm else None)

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.backbone(images.to(next(self.parameters()).dtype))
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(maps)))


def _with_area(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Objects or detections without those whose box has no area."""
    keep = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1)
    return {name: values[keep] for name, values in found.items()}


def _with_whole_masks(found: dict[str, Tensor], size: torch.Size) -> dict[str, Tensor]:
    """Detections, their masks (n, 1, m, m) of boxes, if there are some, as masks of the whole image (n, H, W)."""
    if "masks" not in found:
        return found
    return found | {"masks": paste_masks_in_image(found["masks"].float(), found["boxes"], tuple(size))[:, 0]}
