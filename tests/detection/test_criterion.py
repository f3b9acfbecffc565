import math

import pytest
import torch

from diffperception.detection.criterion import set_losses
from diffperception.detection.matcher import PaddedTargets

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
