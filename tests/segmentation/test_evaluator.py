import json
import math

import pytest
import torch

from diffperception.segmentation import MeanIoU


def score(labels: list, mask: list, num_classes: int = 3) -> MeanIoU:
    result = MeanIoU(num_classes)
    result.update(torch.tensor(labels), torch.tensor(mask))
    return result


def test_a_hand_computed_case():
    result = score([[0, 0, 1], [1, 1, 0]], [[0, 1, 1], [1, 0, 255]], 2)
    assert result.per_class() == pytest.approx([1 / 3, 2 / 4])
    assert result.mean() == pytest.approx((1 / 3 + 2 / 4) / 2)


def test_ignored_pixels_count_nowhere_and_absent_classes_are_left_out():
    result = score([[0, 1, 2, 2]], [[0, 1, 255, 255]], 28)
    assert result.mean() == 1
    assert math.isnan(result.per_class()[2])


def test_a_class_that_is_only_predicted_counts_as_wrong():
    assert score([[0, 2]], [[0, 0]]).per_class()[2] == 0


def test_images_add_up():
    torch.manual_seed(0)
    labels, masks = torch.randint(0, 3, (2, 8, 9)), torch.randint(0, 3, (2, 8, 9))
    both, at_once = MeanIoU(3), MeanIoU(3)
    for image in zip(labels, masks, strict=True):
        both.update(*image)
    at_once.update(labels, masks)
    assert both.mean() == at_once.mean()


def test_the_summary_is_json():
    summary = score([[0, 1]], [[0, 0]]).summary(["sky", "sea", "land"])
    assert json.loads(json.dumps(summary)) == {"miou": 0.25, "iou": {"sky": 0.5, "sea": 0.0, "land": None}}


def test_nothing_labelled_has_no_score():
    assert score([[0, 1]], [[255, 255]]).summary(["a", "b", "c"])["miou"] is None


@pytest.mark.parametrize(("labels", "mask"), [([[0, 3]], [[0, 0]]), ([[0, 0]], [[0, 7]]), ([[0, -1]], [[0, 0]])])
def test_unknown_values_are_named(labels, mask):
    with pytest.raises(ValueError, match=r"classes 0 to 2, but values \[(3|7|-1)\]"):
        score(labels, mask)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="of shape"):
        score([[0, 1]], [[0]])
