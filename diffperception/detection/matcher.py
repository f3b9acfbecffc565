"""Which proposal learns which object: dynamic-k (SimOTA, arXiv 2107.08430) and one-to-one (DETR, arXiv 2005.12872).

All images of a batch, and all stages, are matched together: a "row" below is one image at one stage. Objects are padded
to the most crowded image, M. Costs are float32 whatever the precision of the network.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from diffperception.detection.boxes import paired_giou

OUTSIDE_COST = 100.0  # the proposal's centre is outside the object
BACKGROUND_COST = 10_000.0  # the proposal's centre is in no object at all
CENTRE_RADIUS = 2.5  # in widths and heights of the object
MAX_K = 5  # an object's k is the sum of its MAX_K best IoUs
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0


@dataclass
class MatchingCost:
    """Weights of the terms of the matching cost."""

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


@dataclass
class PaddedTargets:
    """Objects of a batch, padded to the most crowded image: boxes (B, M, 4) xyxy pixels, labels and valid (B, M)."""

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    image_sizes: Tensor  # (B, 4) width, height, width, height in pixels

    @classmethod
    def collate(cls, targets: list[dict], image_sizes: Tensor) -> "PaddedTargets":
        """Pad torchvision detection targets; `iscrowd` regions are no objects to learn."""
        device = image_sizes.device
        keep = [
            ~t["iscrowd"].bool() if "iscrowd" in t else torch.ones_like(t["labels"], dtype=torch.bool) for t in targets
        ]
        boxes = [t["boxes"][k].to(device, torch.float32).reshape(-1, 4) for t, k in zip(targets, keep, strict=True)]
        labels = [t["labels"][k].to(device) for t, k in zip(targets, keep, strict=True)]
        counts = torch.tensor([len(b) for b in labels], device=device)
        most = max(1, max(len(b) for b in labels))
        # A pad is a box of one pixel: its geometry stays finite, and `valid` keeps it out of every result.
        padded = image_sizes.new_tensor([0.0, 0.0, 1.0, 1.0]).repeat(len(boxes), most, 1)
        padded_labels = torch.zeros(len(boxes), most, dtype=torch.int64, device=device)
        for row, (b, label) in enumerate(zip(boxes, labels, strict=True)):
            padded[row, : len(b)] = b
            padded_labels[row, : len(b)] = label
        return cls(padded, padded_labels, torch.arange(most, device=device) < counts[:, None], image_sizes)

    def repeat(self, stages: int) -> "PaddedTargets":
        """The same objects for every stage: rows (S * B, ...), stage by stage."""
        return PaddedTargets(*(x.repeat(stages, *[1] * (x.dim() - 1)) for x in vars(self).values()))

    def limit(self, proposals: int, generator: torch.Generator | None = None) -> "PaddedTargets":
        """At most `proposals` objects an image, chosen at random where there are more."""
        if self.valid.shape[1] <= proposals:
            return self
        order = torch.rand(self.valid.shape, generator=generator).to(self.valid.device).masked_fill(~self.valid, 2.0)
        rank = order.argsort(1).argsort(1)
        return PaddedTargets(self.boxes, self.labels, self.valid & (rank < proposals), self.image_sizes)


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    method: Literal["dynamic_k", "hungarian"] = "dynamic_k",
    weights: MatchingCost | None = None,
) -> Tensor:
    """Assign proposals to objects.

    Args:
        logits: (R, N, K).
        boxes: (R, N, 4) xyxy in pixels.
        targets: R rows with at most N valid objects each (see `PaddedTargets.limit`).

    Returns: (R, N) int64, the index of the object that each proposal learns, -1 for none. Every valid object has at
    least one proposal.
    """
    cost, iou = matching_cost(logits.float(), boxes.float(), targets, weights or MatchingCost())
    if method == "hungarian":
        return _one_to_one(cost, targets.valid)
    return _dynamic_k(cost, iou, targets.valid)


def matching_cost(
    logits: Tensor, boxes: Tensor, targets: PaddedTargets, weights: MatchingCost
) -> tuple[Tensor, Tensor]:
    """Cost and IoU of every proposal with every object: two (R, N, M); a pad costs infinity and overlaps nothing.

    A proposal whose cost is not a number costs as much as a proposal can, so that training ends with a named loss
    rather than inside the matcher.
    """
    index = targets.labels[:, None].expand(-1, logits.shape[1], -1)
    log_p = torch.nn.functional.logsigmoid(logits)
    p = log_p.exp()
    positive = FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * -log_p
    negative = (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * (logits - log_p)  # -log(1 - p) = logits - log p
    classification = (positive - negative).gather(2, index)

    size = targets.image_sizes[:, None]
    l1 = torch.cdist(boxes / size, targets.boxes / size, p=1)
    iou, giou = paired_giou(boxes[:, :, None], targets.boxes[:, None])

    in_object, in_region = _centres_inside(boxes, targets.boxes)
    in_any = ((in_object | in_region) & targets.valid[:, None]).any(2, keepdim=True)
    cost = weights.classification * classification + weights.l1 * l1 - weights.giou * giou
    cost = cost + OUTSIDE_COST * ~(in_object & in_region) + BACKGROUND_COST * ~in_any
    pad = ~targets.valid[:, None]
    finite = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=1e6)
    return finite.masked_fill(pad, torch.inf), iou.nan_to_num(0.0).masked_fill(pad, 0.0)


def _centres_inside(boxes: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each proposal's centre (R, N) is in each object, and in its centre region (R, M): two (R, N, M)."""
    centres = ((boxes[..., :2] + boxes[..., 2:]) / 2)[:, :, None]
    low, high = objects[:, None, :, :2], objects[:, None, :, 2:]
    middle, reach = (low + high) / 2, CENTRE_RADIUS * (high - low)
    in_object = ((centres > low) & (centres < high)).all(-1)
    in_region = ((centres > middle - reach) & (centres < middle + reach)).all(-1)
    return in_object, in_region


def _dynamic_k(cost: Tensor, iou: Tensor, valid: Tensor) -> Tensor:
    proposals = cost.shape[1]
    k = iou.topk(min(MAX_K, proposals), dim=1).values.sum(1).int().clamp(min=1)  # (R, M)
    rank = cost.argsort(stable=True, dim=1).argsort(1)  # of each proposal in an object's order
    claimed = (rank < k[:, None]) & valid[:, None]
    # A proposal claimed twice goes to the object it is cheapest for.
    contested = claimed.sum(2, keepdim=True) > 1
    cheapest = torch.zeros_like(claimed).scatter_(2, cost.argmin(2, keepdim=True), True)
    claimed = torch.where(contested, cheapest, claimed)
    rows = (valid & ~claimed.any(1)).any(1).nonzero()[:, 0]
    if len(rows):
        claimed[rows] = _match_left_over(claimed[rows], cost[rows], valid[rows])
    return torch.where(claimed.any(2), claimed.int().argmax(2), -1)


def _match_left_over(claimed: Tensor, cost: Tensor, valid: Tensor) -> Tensor:
    """Give every object without a proposal its cheapest free one; the cheaper of two claimants is served first.

    Each round serves an object in every row that has one left and a free proposal, so at most M rounds are needed. A
    row whose proposals are used up while an object has none is matched one to one.
    """
    while True:
        left_over = valid & ~claimed.any(1)  # (R, M)
        free = ~claimed.any(2)  # (R, N)
        if not (left_over.any(1) & free.any(1)).any():
            break
        open_cost = cost.masked_fill(~(free[:, :, None] & left_over[:, None]), torch.inf)
        wish = torch.zeros_like(claimed).scatter_(1, open_cost.argmin(1, keepdim=True), True) & open_cost.isfinite()
        owner = open_cost.masked_fill(~wish, torch.inf).argmin(2, keepdim=True)
        claimed = claimed | (wish & torch.zeros_like(claimed).scatter_(2, owner, True))
    for row in left_over.any(1).nonzero()[:, 0]:
        matched = _one_to_one(cost[row, None], valid[row, None])
        claimed[row] = matched[0, :, None] == torch.arange(cost.shape[2], device=cost.device)
    return claimed


def _one_to_one(cost: Tensor, valid: Tensor) -> Tensor:
    """The assignment of least total cost (scipy): cost (R, N, M), valid (R, M) -> (R, N)."""
    matches = torch.full(cost.shape[:2], -1, dtype=torch.int64)
    for row, (c, v) in enumerate(zip(cost.cpu(), valid.cpu(), strict=True)):
        objects = v.nonzero()[:, 0]
        proposal, column = linear_sum_assignment(c[:, objects].numpy())
        matches[row, torch.from_numpy(proposal)] = objects[torch.from_numpy(column)]
    return matches.to(cost.device)
