import pytest
import torch
from scipy.optimize import linear_sum_assignment

from diffperception.detection.matcher import SetWeights, match, matching_cost
from diffperception.detection.targets import PaddedTargets
from tests.detection.scenes import CLASSES, random_boxes
from tests.parity.naive import dynamic_k

SIZE = torch.tensor([[100.0, 80.0, 100.0, 80.0]])


def targets_of(counts: list[int]) -> PaddedTargets:
    targets = [
        {"boxes": random_boxes(n, 100, 80, seed=10 + i), "labels": torch.arange(n) % len(CLASSES)}
        for i, n in enumerate(counts)
    ]
    return PaddedTargets.collate(targets, SIZE.expand(len(counts), -1))


def proposals_of(rows: int, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, count, len(CLASSES), generator=generator)
    return logits, torch.stack([random_boxes(count, 100, 80, seed + row) for row in range(rows)])


@pytest.mark.parametrize(("proposals", "counts"), [(30, [4, 0, 7]), (8, [6, 5, 1]), (200, [12, 30, 2])])
def test_dynamic_k_equals_the_object_by_object_rule(proposals, counts):
    targets = targets_of(counts)
    logits, boxes = proposals_of(len(counts), proposals)
    matches = match(logits, boxes, targets)
    cost, iou = matching_cost(logits, boxes, targets, SetWeights())
    for row, n in enumerate(counts):
        assert matches[row].tolist() == dynamic_k(cost[row, :, :n], iou[row, :, :n])


@pytest.mark.parametrize("method", ["dynamic_k", "hungarian"])
@pytest.mark.parametrize(("proposals", "counts"), [(1, [1, 0]), (3, [3, 2]), (5, [5, 5]), (60, [60, 9])])
def test_every_object_is_learned_even_when_proposals_are_few(method, proposals, counts):
    matches = match(*proposals_of(len(counts), proposals), targets_of(counts), method)
    for row, n in zip(matches, counts, strict=True):
        assert set(row.tolist()) - {-1} == set(range(n))


def test_crowds_that_dynamic_k_cannot_serve_are_matched_one_to_one():
    # Five proposals on object 0 give it k = 5 of the 6 proposals; one is left for three other objects.
    objects = torch.tensor([[0.0, 0.0, 40, 40], [60, 60, 70, 70], [80, 60, 90, 70], [60, 10, 70, 20]])
    targets = PaddedTargets.collate([{"boxes": objects, "labels": torch.zeros(4, dtype=torch.int64)}], SIZE)
    boxes = torch.cat([objects[:1].expand(5, -1), objects[1:2]])[None]
    matches = match(torch.zeros(1, 6, len(CLASSES)), boxes, targets)[0]
    assert set(matches.tolist()) - {-1} == {0, 1, 2, 3}


def test_hungarian_has_the_least_total_cost():
    targets = targets_of([6])
    logits, boxes = proposals_of(1, 15)
    cost = matching_cost(logits, boxes, targets, SetWeights())[0][0]
    matches = match(logits, boxes, targets, "hungarian")[0]
    chosen = sum(cost[i, j] for i, j in enumerate(matches.tolist()) if j >= 0)
    rows, columns = linear_sum_assignment(cost.numpy())
    assert chosen.item() == pytest.approx(cost[rows, columns].sum().item())
    assert (matches >= 0).sum() == 6


def test_a_row_is_matched_as_if_it_were_alone():
    targets = targets_of([3, 9, 0])
    logits, boxes = proposals_of(3, 25)
    together = match(logits, boxes, targets)
    for row, n in enumerate([3, 9, 0]):
        objects = (x[row : row + 1, : max(1, n)] for x in (targets.boxes, targets.labels, targets.valid))
        alone = PaddedTargets(*objects, SIZE, targets.present[row : row + 1, : max(1, n)])
        assert torch.equal(match(logits[row, None], boxes[row, None], alone)[0], together[row])


def test_crowd_regions_are_not_objects():
    target = {"boxes": random_boxes(3, 100, 80), "labels": torch.zeros(3, dtype=torch.int64)}
    target["iscrowd"] = torch.tensor([0, 1, 0])
    assert PaddedTargets.collate([target], SIZE).valid.tolist() == [[True, True]]


def test_non_finite_predictions_end_in_a_match_not_in_an_exception():
    logits, boxes = proposals_of(1, 10)
    logits[0, 3] = torch.nan
    boxes[0, 4] = torch.inf
    assert set(match(logits, boxes, targets_of([4]))[0].tolist()) - {-1} == {0, 1, 2, 3}


def test_more_objects_than_proposals_are_subsampled_to_as_many():
    limited = targets_of([600, 20]).limit(500, torch.Generator().manual_seed(0))
    assert limited.valid.sum(1).tolist() == [500, 20]
    matches = match(*proposals_of(2, 500), limited)
    assert set(matches[0].tolist()) - {-1} == set(limited.valid[0].nonzero()[:, 0].tolist())
