import math
from dataclasses import replace

import pytest
import torch

from diffperception.detection.criterion import Matches, SetCriterion, draw_federated_classes, quality_focal_loss
from diffperception.detection.heads.boxes import HeadOutput
from diffperception.detection.targets import PaddedTargets
from tests.detection.scenes import random_image, random_target, set_losses, tiny_detector

SIZE = torch.tensor([[100.0, 50.0, 100.0, 50.0]])
OBJECT = torch.tensor([[10.0, 10.0, 30.0, 20.0]])
TARGETS = PaddedTargets.collate([{"boxes": OBJECT, "labels": torch.tensor([1])}], SIZE)


def losses(logits: torch.Tensor, box: torch.Tensor, match: int) -> dict[str, float]:
    values = set_losses(logits.view(1, 1, 1, -1), box.view(1, 1, 1, 4), TARGETS, torch.tensor([[[match]]]))
    return {name: value.item() for name, value in values.items()}


def test_the_right_box_and_a_sure_right_class_cost_nothing():
    values = losses(torch.tensor([-30.0, 30.0, -30.0]), OBJECT, match=0)
    assert values == {"classification": pytest.approx(0, abs=1e-9), "l1": 0, "giou": pytest.approx(0, abs=1e-6)}


def test_focal_loss_at_even_odds():
    # p = 1/2: alpha (1-p)^2 log 2 for the object's class, (1-alpha) p^2 log 2 for each of the others.
    values = losses(torch.zeros(3), OBJECT, match=0)
    assert values["classification"] == pytest.approx((0.25 + 2 * 0.75) * 0.25 * math.log(2), rel=1e-5)


def test_l1_is_in_units_of_the_image_and_giou_of_disjoint_boxes_exceeds_one():
    values = losses(torch.zeros(3), OBJECT + torch.tensor([50.0, 0.0, 50.0, 0.0]), match=0)
    assert values["l1"] == pytest.approx(2 * 0.5)
    # hull 70 x 10, union 2 x 200: GIoU = 0 - 300/700
    assert values["giou"] == pytest.approx(1 + 300 / 700, rel=1e-5)


def test_an_unmatched_proposal_learns_background_alone():
    values = losses(torch.zeros(3), OBJECT * 2, match=-1)
    assert values["l1"] == values["giou"] == 0
    assert values["classification"] == pytest.approx(3 * 0.75 * 0.25 * math.log(2), rel=1e-5)


def test_each_stage_is_divided_by_its_own_pairs():
    logits, boxes = torch.zeros(2, 1, 4, 3), OBJECT.expand(2, 1, 4, 4)
    matches = torch.tensor([[[0, -1, -1, -1]], [[0, 0, 0, -1]]])
    shifted = set_losses(logits, boxes + 5, TARGETS, matches)
    assert shifted["l1"][0].item() == pytest.approx(shifted["l1"][1].item())


def test_masked_classes_add_nothing():
    logits, boxes = torch.zeros(1, 1, 1, 3), OBJECT.view(1, 1, 1, 4)
    mask = torch.tensor([[False, True, False]])
    value = set_losses(logits, boxes, TARGETS, torch.tensor([[[0]]]), mask)["classification"]
    assert value.item() == pytest.approx(0.25 * 0.25 * math.log(2), rel=1e-5)


def test_the_quality_focal_loss_is_nothing_where_scores_are_the_overlaps_and_the_papers_elsewhere():
    object_ = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    boxes = torch.tensor([[0.0, 0.0, 10.0, 5.0], [50.0, 50.0, 60.0, 60.0]])  # the first overlaps it by a half
    targets = PaddedTargets.collate([{"boxes": object_, "labels": torch.tensor([1])}], torch.tensor([[96.0, 64] * 2]))
    matches = Matches(torch.tensor([[[0, -1]]]))
    never = -200.0

    def loss(logits: list[list[float]]) -> float:
        return float(quality_focal_loss(HeadOutput(torch.tensor([[logits]]), boxes[None, None]), targets, matches))

    assert loss([[never, 0.0], [never, never]]) == pytest.approx(0, abs=1e-6)
    sigma = torch.tensor(2.0).sigmoid()
    entropy = -(0.5 * sigma.log() + 0.5 * (1 - sigma).log())
    assert loss([[never, 2.0], [never, never]]) == pytest.approx(float((0.5 - sigma) ** 2 * entropy), rel=1e-4)
    negative = float(sigma**2 * -(1 - sigma).log())  # of a class, or a cell, that is no object
    assert loss([[2.0, 0.0], [never, never]]) == pytest.approx(negative, rel=1e-4)
    assert loss([[never, 0.0], [never, 2.0]]) == pytest.approx(negative, rel=1e-4)
    targets = replace(targets, counted_classes=torch.tensor([[False, True]]))
    assert loss([[2.0, 0.0], [never, never]]) == pytest.approx(0, abs=1e-6)


def test_the_quality_is_learned_where_it_is_asked_for():
    detectors = [tiny_detector(criterion=SetCriterion(**changes)) for changes in ({}, {"quality": True})]
    images, targets = [random_image(64, 64, 1)], [random_target(3, 64, 64, seed=1)]
    plain, quality = (d.loss(images, targets, torch.Generator().manual_seed(0)) for d in detectors)
    assert plain.keys() == quality.keys()
    assert torch.equal(plain["giou"], quality["giou"])
    assert plain["classification"] != quality["classification"]


def draw(labels: list[int], frequencies: list[float], count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    chosen = draw_federated_classes(
        torch.tensor(labels, dtype=torch.int64), torch.tensor(frequencies), count, generator
    )
    assert chosen.shape == (len(frequencies),)
    return chosen.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("frequencies", [[1.0] * 9, [0.0] * 9, [1e6, 0, 1, 1, 1, 1, 1, 0, 1]])
@pytest.mark.parametrize(("labels", "count"), [([], 3), ([1, 7, 7], 3), ([1, 7], 2), ([1, 7], 20), ([1, 2, 3, 7], 2)])
def test_present_classes_are_kept_and_filled_up_to_the_number(frequencies, labels, count):
    chosen = draw(labels, frequencies, count)
    assert set(labels) <= set(chosen)
    assert len(chosen) == max(len(set(labels)), min(count, len(frequencies)))


def test_other_classes_come_as_often_as_the_root_of_their_frequency_says():
    # Two of the classes 1, 2, 3 with weights 1, 2, 3 are drawn beside class 0: an outcome is the pair drawn.
    draws = 3000
    left_out = [({1, 2, 3} - set(draw([0], [9.0, 1.0, 4.0, 9.0], 3, seed))).pop() for seed in range(draws)]
    # P(k is not drawn) = sum over both orders of the two others.
    expected = {1: 2 / 6 * 3 / 4 + 3 / 6 * 2 / 3, 2: 1 / 6 * 3 / 5 + 3 / 6 * 1 / 3, 3: 1 / 6 * 2 / 5 + 2 / 6 * 1 / 4}
    chi_square = sum((left_out.count(k) - draws * p) ** 2 / (draws * p) for k, p in expected.items())
    assert chi_square < 9.2  # two degrees of freedom, 1 %


def test_the_draw_is_the_generators():
    assert draw([3], [1.0] * 50, 10, seed=4) == draw([3], [1.0] * 50, 10, seed=4)
    assert draw([3], [1.0] * 50, 10, seed=4) != draw([3], [1.0] * 50, 10, seed=5)


def test_masked_classes_get_no_gradient():
    logits = torch.randn(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[True, True, False, False]])
    matches = torch.tensor([[[0, -1, -1]], [[-1, 0, -1]]])
    set_losses(logits, OBJECT.expand(2, 1, 3, 4), TARGETS, matches, mask)["classification"].sum().backward()
    assert (logits.grad[..., ~mask[0]] == 0).all()
    assert (logits.grad[..., mask[0]] != 0).all()
