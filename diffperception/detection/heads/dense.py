"""A dense head on the pyramid that a detector learns beside its own (collaborative heads, arXiv 2211.12860).

Every cell of every level says classes and one box. Objects are assigned to cells by ATSS (arXiv 1912.02424); scores
learn how good the box is (quality focal loss, arXiv 2006.04388), boxes learn GIoU.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, batched_nms

from diffperception.detection.boxes import paired_giou
from diffperception.detection.criterion import Matches, giou_loss, quality_focal_loss
from diffperception.detection.heads.boxes import PRIOR_PROBABILITY, HeadOutput
from diffperception.detection.targets import PaddedTargets
from diffperception.devices import to_device
from diffperception.models import Model

ANCHOR_CELLS = 8  # side of a cell's anchor, the square that objects are compared with and boxes begin as
CANDIDATES = 9  # cells of a level, the nearest to an object's centre, that it may be assigned to
MOST_BEFORE_NMS = 1000
MAX_LOG_REACH = math.log(1000 / 16)  # a side is at most so many times as far as the anchor's


class AuxiliaryHead(Model, ABC):
    """What learns from the pyramid beside a detector's head, in training alone; yours may derive from it.

    Attributes:
        width: channels of the pyramid that it wants: those of the detector's head.
    """

    width: int

    @abstractmethod
    def forward(self, maps: Sequence[Tensor], strides: Sequence[int]) -> "DenseOutput":
        """What every place says of the images.

        Args:
            maps: of the padded images, (B, width, H / stride, W / stride) a level, finest first.
            strides: of the levels, in pixels.
        """

    @abstractmethod
    def loss(self, output: "DenseOutput", targets: PaddedTargets) -> dict[str, Tensor]:
        """Weighted terms by name, 0-d each, which are added to those of the detector's criterion.

        The objects are on the CPU.
        """

    @abstractmethod
    def proposals(self, output: "DenseOutput", size: Tensor) -> dict[str, Tensor]:
        """Objects in one image of this size (4,), whose output is given (B = 1), best first.

        Returns: `boxes` (n, 4) xyxy in pixels of the image as the detector sees it, `scores` and `labels` (n,).
        """


@dataclass
class DenseOutput:
    """What every cell says, P in all, level by level: logits (B, P, K) and boxes (B, P, 4; xyxy pixels), float32.

    Attributes:
        anchors: (P, 4) of the cells, on the CPU.
        cells: how many each level has.
    """

    logits: Tensor
    boxes: Tensor
    anchors: Tensor
    cells: list[int]

    def best(self, count: int, sizes: Tensor) -> Tensor:
        """The boxes (B, count, 4) of the best cells, again where there are fewer, clipped to images of sizes (B, 4)."""
        scores = self.logits.detach().amax(2)
        best = scores.topk(min(count, scores.shape[1]), dim=1).indices
        chosen = best[:, torch.arange(count, device=best.device) % best.shape[1], None].expand(-1, -1, 4)
        return torch.minimum(self.boxes.detach().gather(1, chosen).clamp(min=0), sizes[:, None])


class DenseHead(AuxiliaryHead):
    """Two towers of convolutions, shared by all levels, with a score per class and the four sides of a box.

    Terms of the loss: `dense_classification` and `dense_giou`, per cell that has an object. All classes count in every
    image.

    Args:
        num_classes: K.
        width: channels of the pyramid and of the towers.
        layers: depth of the towers.
        min_stride: levels that are finer than so many pixels a cell are left to the detector's head.
        classification_weight, giou_weight: of the terms.
        min_score: proposals with a lower score are left out.
        nms_threshold: of two proposals of a class whose IoU is above this, only the better counts.
    """

    class_layers: ClassVar = {"class_logits": 0}

    def __init__(
        self,
        num_classes: int,
        width: int = 256,
        layers: int = 2,
        min_stride: int = 1,
        classification_weight: float = 1.0,
        giou_weight: float = 2.0,
        min_score: float = 0.05,
        nms_threshold: float = 0.6,
    ):
        super().__init__()
        self.width = width
        self.min_stride = min_stride
        self.weights = {"dense_classification": classification_weight, "dense_giou": giou_weight}
        self.min_score = min_score
        self.nms_threshold = nms_threshold
        self.class_tower, self.box_tower = _convolutions(width, layers), _convolutions(width, layers)
        self.class_logits = nn.Conv2d(width, num_classes, 3, padding=1)
        self.box_sides = nn.Conv2d(width, 4, 3, padding=1)
        for layer in (self.class_logits, self.box_sides):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(
            self.class_logits.get_parameter("bias"), -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)
        )
        nn.init.zeros_(self.box_sides.get_parameter("bias"))

    def forward(self, maps: Sequence[Tensor], strides: Sequence[int]) -> DenseOutput:
        """See `AuxiliaryHead.forward`; a place is a cell of a level."""
        levels = [(m, s) for m, s in zip(maps, strides, strict=True) if s >= self.min_stride]
        if not levels:
            raise ValueError(
                f"min_stride is {self.min_stride}, but the pyramid's coarsest level has {max(strides)} pixels a cell:"
                " give less"
            )
        maps, strides = zip(*levels, strict=True)
        logits = [self.class_logits(self.class_tower(m)).flatten(2).transpose(1, 2) for m in maps]
        sides = [self.box_sides(self.box_tower(m)).flatten(2).transpose(1, 2) for m in maps]
        anchors = torch.cat([_anchors(m.shape[-2], m.shape[-1], s) for m, s in zip(maps, strides, strict=True)])
        low, high = to_device(anchors, maps[0].device).split(2, dim=1)
        middle, half = (low + high) / 2, (high - low) / 2
        before, behind = (torch.cat(sides, 1).float().clamp(max=MAX_LOG_REACH).exp() * half.repeat(1, 2)).split(
            2, dim=2
        )
        boxes = torch.cat([middle - before, middle + behind], dim=2)
        return DenseOutput(torch.cat(logits, 1).float(), boxes, anchors, [m[0, 0].numel() for m in maps])

    def loss(self, output: DenseOutput, targets: PaddedTargets) -> dict[str, Tensor]:
        """See `AuxiliaryHead.loss`. Which cell learns what does not depend on the weights: no device is waited for."""
        pairs = zip(targets.boxes, targets.valid, strict=True)
        index = torch.stack([assign_cells(boxes[valid], output.anchors, output.cells) for boxes, valid in pairs])
        matches = Matches(to_device(index, output.boxes.device)[None])
        objects = targets.to(output.boxes.device)
        dense = HeadOutput(output.logits[None], output.boxes[None])
        terms = {
            "dense_classification": quality_focal_loss(dense, objects, matches),
            "dense_giou": giou_loss(dense, objects, matches),
        }
        return {name: self.weights[name] * value.sum() for name, value in terms.items()}

    def proposals(self, output: DenseOutput, size: Tensor) -> dict[str, Tensor]:
        """See `AuxiliaryHead.proposals`: the best class of each cell, then class-wise NMS."""
        scores, labels = output.logits[0].sigmoid().max(1)
        scores, best = scores.topk(min(MOST_BEFORE_NMS, len(scores)))
        boxes = torch.minimum(output.boxes[0, best].clamp(min=0), size)
        good = (scores >= self.min_score) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores, labels = boxes[good], scores[good], labels[best][good]
        kept = batched_nms(boxes, scores, labels, self.nms_threshold)
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def assign_cells(objects: Tensor, anchors: Tensor, cells: Sequence[int]) -> Tensor:
    """Which object each cell learns, (P,) int64, -1 for none (ATSS, arXiv 1912.02424, algorithm 1).

    Of the cells nearest to an object's centre, those inside of it whose anchors overlap it more than the mean plus the
    standard deviation; the one that overlaps it most where there are none. A cell wanted twice takes the object that
    its anchor overlaps more.

    Args:
        objects: (m, 4) xyxy in pixels, of one image.
        anchors: (P, 4), of the cells of all levels, level by level.
        cells: how many each level has.
    """
    if not len(objects):
        return torch.full((len(anchors),), -1)
    centres, middles = ((x[:, :2] + x[:, 2:]) / 2 for x in (anchors, objects))
    distances = torch.cdist(middles, centres).split(list(cells), dim=1)
    starts = [sum(cells[:level]) for level in range(len(cells))]
    nearest = [d.topk(min(CANDIDATES, d.shape[1]), largest=False).indices for d in distances]
    candidates = torch.cat([index + start for index, start in zip(nearest, starts, strict=True)], 1)  # (m, C)
    iou = paired_giou(objects[:, None], anchors[candidates])[0]
    inside = ((centres[candidates] > objects[:, None, :2]) & (centres[candidates] < objects[:, None, 2:])).all(2)
    chosen = inside & (iou >= iou.mean(1, keepdim=True) + iou.std(1, correction=0, keepdim=True))
    most = F.one_hot(iou.argmax(1), iou.shape[1]).bool()
    chosen |= most & ~chosen.any(1, keepdim=True)
    overlap = iou.new_full((len(objects), len(anchors)), -1).scatter_(1, candidates, iou.masked_fill(~chosen, -1))
    value, owner = overlap.max(0)
    return torch.where(value >= 0, owner, -1)


def _anchors(height: int, width: int, stride: int) -> Tensor:
    """(height * width, 4) xyxy in pixels, a square about the centre of each cell, row by row."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = (torch.stack([x, y], dim=2).flatten(0, 1) + 0.5) * stride
    half = ANCHOR_CELLS * stride / 2
    return torch.cat([centres - half, centres + half], dim=1)


def _convolutions(width: int, layers: int) -> nn.Sequential:
    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(math.gcd(32, channels), channels)

    return nn.Sequential(*(Conv2dNormActivation(width, width, norm_layer=norm, bias=False) for _ in range(layers)))
