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
from diffperception.detection.targets import PaddedTargets
from diffperception.devices import to_device

Matcher = Literal["dynamic_k", "hungarian"]

OUTSIDE_COST = 100.0  # the proposal's centre is outside the object
BACKGROUND_COST = 10_000.0  # the proposal's centre is in no object at all
CENTRE_RADIUS = 2.5  # in widths and heights of the object
MAX_K = 5  # an object's k is the sum of its MAX_K best IoUs
FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
GPU_ROUNDS = 4  # of serving objects that are left over, between two looks at whether there are more


@dataclass
class SetWeights:
    """Weights of the three terms, of a matching cost or of a training loss."""

    classification: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: PaddedTargets,
    method: Matcher = "dynamic_k",
    weights: SetWeights | None = None,
) -> Tensor:
    """Assign proposals to objects.

    Args:
        logits: (R, N, K).
        boxes: (R, N, 4) xyxy in pixels.
        targets: R rows with at most N valid objects each (see `PaddedTargets.repeat` and `limit`).

    Returns: (R, N) int64, the index of the object that each proposal learns, -1 for none. Every valid object has at
    least one proposal.
    """
    cost, iou = matching_cost(logits.float(), boxes.float(), targets, weights or SetWeights())
    if method == "hungarian":
        return _one_to_one(cost, targets.valid)
    return _dynamic_k(cost, iou, targets.valid)


def matching_cost(logits: Tensor, boxes: Tensor, targets: PaddedTargets, weights: SetWeights) -> tuple[Tensor, Tensor]:
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

    Each round serves an object in every row that has one left and a free proposal, so at most M rounds are needed; one
    too many changes nothing. A row whose proposals are used up while an object has none is matched one to one.
    """
    rounds = 1 if cost.device.type == "cpu" else GPU_ROUNDS
    more, stuck = torch.ones(2, len(cost), dtype=torch.bool)
    while more.any():
        for _ in range(rounds):
            claimed = _serve(claimed, cost, valid)
        left_over = (valid & ~claimed.any(1)).any(1)
        more, stuck = torch.stack([left_over & ~claimed.any(2).all(1), left_over]).cpu()
    for row in stuck.nonzero()[:, 0].tolist():
        matched = _one_to_one(cost[row, None], valid[row, None])
        claimed[row] = matched[0, :, None] == torch.arange(cost.shape[2], device=cost.device)
    return claimed


def _serve(claimed: Tensor, cost: Tensor, valid: Tensor) -> Tensor:
    """One round: each row's free proposals take the cheapest of the objects that are left over and wish for them."""
    free, left_over = ~claimed.any(2), valid & ~claimed.any(1)
    open_cost = cost.masked_fill(~(free[:, :, None] & left_over[:, None]), torch.inf)
    wish = torch.zeros_like(claimed).scatter_(1, open_cost.argmin(1, keepdim=True), True) & open_cost.isfinite()
    owner = open_cost.masked_fill(~wish, torch.inf).argmin(2, keepdim=True)
    return claimed | (wish & torch.zeros_like(claimed).scatter_(2, owner, True))


def _one_to_one(cost: Tensor, valid: Tensor) -> Tensor:
    """The assignment of least total cost (scipy): cost (R, N, M), valid (R, M) -> (R, N)."""
    matches = torch.full(cost.shape[:2], -1, dtype=torch.int64)
    for row, (c, v) in enumerate(zip(cost.cpu(), valid.cpu(), strict=True)):
        objects = v.nonzero()[:, 0]
        proposal, column = linear_sum_assignment(c[:, objects].numpy())
        matches[row, torch.from_numpy(proposal)] = objects[torch.from_numpy(column)]
    return to_device(matches, cost.device)
