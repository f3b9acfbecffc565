"""The training loss of DiffusionDet over all stages, from named terms; which classes count in it (federated loss)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from diffperception.detection.boxes import paired_giou
from diffperception.detection.heads.boxes import HeadOutput
from diffperception.detection.matcher import FOCAL_ALPHA, FOCAL_GAMMA, Matcher, SetWeights, match
from diffperception.detection.targets import PaddedTargets
from diffperception.devices import to_device
from diffperception.models import Model


@dataclass
class Matches:
    """Which object each proposal learns: `index` (S, B, N) int64, -1 for none."""

    index: Tensor

    @property
    def matched(self) -> Tensor:
        """(S, B, N) whether there is one."""
        return self.index >= 0

    def of(self, objects: Tensor) -> Tensor:
        """What the objects have, (B, M, ...), for each proposal: (S, B, N, ...); unmatched ones have the first's."""
        image = torch.arange(len(objects), device=objects.device)[:, None]
        return objects[image, self.index.clamp(min=0)]

    def per_pair(self, values: Tensor) -> Tensor:
        """Sum of (S, B, N, ...) over the number of matched pairs of each stage (1 if none): (S,)."""
        return values.sum(tuple(range(1, values.dim()))) / self.matched.sum((1, 2)).clamp(min=1)


@dataclass
class Term(ABC):
    """A term of the training loss; yours derives from it, as a dataclass, and has arguments that a file can keep."""

    needs_masks: ClassVar[bool] = False  # whether targets must have masks

    weight: float = 1.0  # of the term in the sum

    @abstractmethod
    def __call__(self, output: HeadOutput, targets: PaddedTargets, matches: Matches) -> Tensor:
        """The value at every stage, (S,), before it is weighted."""


class Criterion(Model, ABC):
    """From what a head gives to a training loss; yours may derive from it.

    Attributes:
        needs_masks: whether targets must have masks.
    """

    needs_masks: bool = False

    @abstractmethod
    def forward(
        self, output: HeadOutput, targets: PaddedTargets, frequencies: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Weighted terms by name, 0-d each; their sum is what to minimise.

        The output is that of all stages, and the targets are on its device. Frequencies (K,) are the numbers of
        training images with each class. The generator, of whatever is drawn, is on the CPU, by default torch's global.
        """


class SetCriterion(Criterion):
    """Focal, L1 and GIoU losses of matched proposals, each summed over the stages (DETR, arXiv 2005.12872).

    Args:
        weights: of the terms `classification`, `l1` and `giou` in the loss; more for the classification speeds up short
            training.
        cost: their weights in the cost of a match.
        matcher: `dynamic_k` (several boxes per object) or `hungarian` (one).
        quality: scores learn the IoU of the box with its object instead of 1 (quality focal loss, arXiv 2006.04388), so
            that of several boxes of an object the best comes first; it is about four times as large as the focal loss.
        federated_classes: for annotations that are not exhaustive (LVIS: 50), the classification loss counts this many
            classes per batch, those present and others drawn by frequency; null counts all.
        terms: further terms by name, such as one for what your head gives beside classes and boxes.
    """

    def __init__(
        self,
        weights: SetWeights = SetWeights(),  # noqa: B008 (the defaults are not changed)
        cost: SetWeights = SetWeights(),  # noqa: B008
        matcher: Matcher = "dynamic_k",
        federated_classes: int | None = None,
        quality: bool = False,
        terms: Mapping[str, Term] | None = None,
    ):
        super().__init__()
        self.cost = cost
        self.matcher: Matcher = matcher
        self.federated_classes = federated_classes
        self.terms = {
            "classification": (weights.classification, quality_focal_loss if quality else classification_loss),
            "l1": (weights.l1, l1_loss),
            "giou": (weights.giou, giou_loss),
        } | {name: (term.weight, term) for name, term in (terms or {}).items()}
        self.needs_masks = any(term.needs_masks for term in (terms or {}).values())

    def forward(
        self, output: HeadOutput, targets: PaddedTargets, frequencies: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """See `Criterion.forward`."""
        stages = len(output.logits)
        logits, boxes = output.logits.flatten(0, 1), output.boxes.flatten(0, 1)
        index = match(logits, boxes, replace(targets, more={}).repeat(stages), self.matcher, self.cost)
        matches = Matches(index.view(output.logits.shape[:3]))
        if self.federated_classes is not None:
            labels = torch.where(targets.present, targets.labels, len(frequencies)).flatten()
            counted = draw_federated_classes(labels, frequencies, self.federated_classes, generator)
            targets = replace(targets, counted_classes=counted.expand(len(targets.labels), -1))
        return {name: weight * term(output, targets, matches).sum() for name, (weight, term) in self.terms.items()}


def classification_loss(output: HeadOutput, targets: PaddedTargets, matches: Matches) -> Tensor:
    """Focal loss (arXiv 1708.02002) of all proposals per matched pair, (S,)."""
    logits = output.logits.float()
    labels, matched = matches.of(targets.labels)[..., None], matches.matched[..., None]
    wanted = torch.zeros_like(logits).scatter_(3, labels, matched.to(logits.dtype))
    return matches.per_pair(_counted(sigmoid_focal_loss(logits, wanted, FOCAL_ALPHA, FOCAL_GAMMA), targets))


def quality_focal_loss(output: HeadOutput, targets: PaddedTargets, matches: Matches) -> Tensor:
    """|q - p|^2 times the cross-entropy of p with q, the IoU of a matched box and its object, 0 elsewhere; per pair.

    (S,); arXiv 2006.04388, eq. 2 with beta = 2.
    """
    logits = output.logits.float()
    iou = paired_giou(output.boxes.detach().float(), matches.of(targets.boxes))[0].clamp(0, 1)
    quality = torch.where(matches.matched, iou, 0)[..., None]
    wanted = torch.zeros_like(logits).scatter_(3, matches.of(targets.labels)[..., None], quality)
    return matches.per_pair(_counted(quality_focal(logits, wanted), targets))


def quality_focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """|q - p|^2 times the cross-entropy of scores p with q, which are wanted; all of one shape."""
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return (wanted - logits.sigmoid()).square() * entropy


def _counted(losses: Tensor, targets: PaddedTargets) -> Tensor:
    """Losses (S, B, N, K) without those of classes that an image does not count."""
    return losses if targets.counted_classes is None else losses * targets.counted_classes[None, :, None]


def l1_loss(output: HeadOutput, targets: PaddedTargets, matches: Matches) -> Tensor:
    """Distance of corners in units of the image per matched pair, (S,)."""
    difference = (output.boxes.float() - matches.of(targets.boxes)) / targets.image_sizes[None, :, None]
    l1 = difference.abs().sum(-1)
    counted = matches.matched | ~l1.isfinite()  # a box that is no number is nobody's match, yet must show in the loss
    return matches.per_pair(torch.where(counted, l1, 0))


def giou_loss(output: HeadOutput, targets: PaddedTargets, matches: Matches) -> Tensor:
    """1 - GIoU (arXiv 1902.09630) per matched pair, (S,)."""
    giou = 1 - paired_giou(output.boxes.float(), matches.of(targets.boxes))[1]
    return matches.per_pair(torch.where(matches.matched, giou, 0))


def draw_federated_classes(
    labels: Tensor, frequencies: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """(K,) bool: which classes a batch's loss counts where annotations are not exhaustive (arXiv 2103.07461).

    Those present are kept, and others are drawn without replacement, with probability proportional to the root of
    their frequency, until there are `count`, or all K.

    Args:
        labels: (n,) int64, of all objects of the batch; K stands for no object.
        frequencies: (K,) number of training images with each class; only their ratios matter.
        generator: on the CPU.
    """
    # Exponential clocks of rates p ring in the order of a draw without replacement with probabilities p.
    clocks = torch.empty(len(frequencies)).exponential_(generator=generator)
    rings = to_device(clocks, frequencies.device) / frequencies.sqrt()
    present = frequencies.new_zeros(len(frequencies) + 1, dtype=torch.bool).index_fill(0, labels, True)[:-1]
    rank = rings.masked_fill(present, -1.0).argsort().argsort()
    return present | (rank < count)
