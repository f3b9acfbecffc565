"""The set loss of DiffusionDet over all stages: focal, L1 and GIoU; and which classes count in it (federated loss)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from diffperception.detection.boxes import paired_giou
from diffperception.detection.matcher import FOCAL_ALPHA, FOCAL_GAMMA, PaddedTargets


@dataclass
class LossWeights:
    """Weights of the terms of the training loss."""

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


def set_losses(
    logits: Tensor, boxes: Tensor, targets: PaddedTargets, matches: Tensor, class_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Unweighted losses of every stage, each divided by the stage's number of matched pairs (1 if none).

    Args:
        logits: (S, B, N, K).
        boxes: (S, B, N, 4) xyxy in pixels.
        targets: of the B images.
        matches: (S, B, N), object of each proposal or -1.
        class_mask: (B, K), False where a class is left out of an image's loss (federated loss); all by default.

    Returns: `classification`, `l1` (of xyxy / image size) and `giou`, each (S,).
    """
    logits, boxes = logits.float(), boxes.float()
    matched = matches >= 0  # (S, B, N)
    pairs = matched.sum((1, 2)).clamp(min=1)
    index = matches.clamp(min=0)

    labels = targets.labels[None].expand(len(logits), -1, -1).gather(2, index)
    wanted = torch.zeros_like(logits).scatter_(3, labels[..., None], matched[..., None].to(logits.dtype))
    focal = sigmoid_focal_loss(logits, wanted, FOCAL_ALPHA, FOCAL_GAMMA)
    if class_mask is not None:
        focal = focal * class_mask[None, :, None]

    objects = targets.boxes[None].expand(len(boxes), -1, -1, -1).gather(2, index[..., None].expand(-1, -1, -1, 4))
    size = targets.image_sizes[None, :, None]
    l1 = ((boxes - objects) / size).abs().sum(-1)
    counted = matched | ~l1.isfinite()  # a box that is no number is nobody's match, yet must show in the loss
    giou = 1 - paired_giou(boxes, objects)[1]
    return {
        "classification": focal.sum((1, 2, 3)) / pairs,
        "l1": torch.where(counted, l1, 0).sum((1, 2)) / pairs,
        "giou": torch.where(matched, giou, 0).sum((1, 2)) / pairs,
    }


def draw_federated_classes(
    labels: Tensor, frequencies: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """The classes that a batch's classification loss counts where annotations are not exhaustive (arXiv 2103.07461).

    Those present are kept, and others are drawn without replacement, with probability proportional to the root of
    their frequency, until there are `count`.

    Args:
        labels: (n,) int64, of all objects of the batch.
        frequencies: (K,) number of training images with each class; only their ratios matter.
        count: classes to keep; more if more are present, and at most K.
        generator: on the CPU.

    Returns: (K,) bool.
    """
    # Exponential clocks of rates p ring in the order of a draw without replacement with probabilities p.
    clocks = torch.empty(len(frequencies)).exponential_(generator=generator)
    rings = clocks.to(frequencies.device) / frequencies.sqrt()
    present = torch.zeros_like(frequencies, dtype=torch.bool).index_fill(0, labels, True)
    rank = rings.masked_fill(present, -1.0).argsort().argsort()
    return present | (rank < count)
