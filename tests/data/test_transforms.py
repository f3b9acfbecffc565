from typing import Any

import pytest
import torch
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

from diffperception.data import TrainingTransforms
from diffperception.data.transforms import PER_BOX, clean

NOTHING = {"horizontal_flip": 0.0, "crop": 0.0, "short_sides": ()}


def sample(boxes: list[list[int]], height: int = 60, width: int = 90) -> tuple[torch.Tensor, dict[str, Any]]:
    """Boxes painted white on black, so that the image tells where they went; later ones are in other channels."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for k, (x1, y1, x2, y2) in enumerate(boxes):
        image[k % 3, y1:y2, x1:x2] = 255
    n = len(boxes)
    return tv_tensors.Image(image), {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(n, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.arange(n),
        "image_id": 4,
        "iscrowd": torch.zeros(n, dtype=torch.int64),
        "area": torch.arange(n) * 10.0,
    }


def bounds(channel: torch.Tensor) -> torch.Tensor:
    y, x = (channel > 130).nonzero(as_tuple=True)  # more than the canvas that zoom_out adds
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


CHANGES = [
    {"horizontal_flip": 1.0},
    {"vertical_flip": 1.0},
    {"zoom_out": 1.0},
    {"iou_crop": 1.0},
    {"crop": 1.0, "crop_short_sides": (60, 80), "crop_sides": (40, 70)},
    {"short_sides": (120, 180)},
    {"short_sides": (600,), "max_long_side": 300},
]


@pytest.mark.parametrize("change", CHANGES)
def test_boxes_follow_what_is_painted(change):
    transforms = TrainingTransforms(**NOTHING | change)
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = transforms(*sample([[10, 20, 30, 50], [40, 5, 80, 25], [60, 30, 85, 58]]))
        assert set(target["labels"].tolist()) <= {0, 1, 2}
        for box, label in zip(target["boxes"], target["labels"], strict=True):
            torch.testing.assert_close(box.as_subclass(torch.Tensor), bounds(image[label]), atol=1.1, rtol=0)


def test_nothing_asked_for_changes_nothing():
    image, target = sample([[10, 20, 30, 50]])
    same, kept = TrainingTransforms(**NOTHING)(image, target)
    assert torch.equal(same, image)
    assert all(torch.equal(kept[key], target[key]) for key in PER_BOX if key in target)


@pytest.mark.parametrize("change", CHANGES)
def test_masks_follow_their_boxes(change):
    image, target = sample([[10, 20, 30, 50], [40, 5, 80, 25], [60, 30, 85, 58]])
    masks = torch.zeros(3, *image.shape[1:], dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, target["boxes"].int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    target["iscrowd"][1] = 1
    for seed in range(10):
        torch.manual_seed(seed)
        changed, kept = TrainingTransforms(**NOTHING | change)(image, target | {"masks": tv_tensors.Mask(masks)})
        assert kept["masks"].shape == (len(kept["boxes"]), *changed.shape[1:])
        assert 1 not in kept["labels"]
        for mask, box in zip(kept["masks"], kept["boxes"], strict=True):
            assert set(mask.unique().tolist()) <= {0, 1}
            around = masks_to_boxes(mask[None])[0] + torch.tensor([0, 0, 1, 1])
            torch.testing.assert_close(around, box.as_subclass(torch.Tensor), atol=1.1, rtol=0)


def test_the_reference_recipe_meets_its_sizes():
    transforms = TrainingTransforms()
    shapes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        image, target = transforms(*sample([[100, 100, 300, 300]], height=480, width=640))
        assert min(image.shape[1:]) in range(480, 801) or max(image.shape[1:]) == 1333
        assert max(image.shape[1:]) <= 1333
        assert target["boxes"].canvas_size == tuple(image.shape[1:])
        shapes.add(tuple(image.shape))
    assert len(shapes) > 6


def test_crowds_and_slivers_leave_with_all_that_belongs_to_them():
    _, target = sample([[0, 0, 10, 10], [5, 5, 6, 40], [-8, 0, 1, 30], [20, 20, 60, 50]])
    target["iscrowd"][3] = 1
    kept = clean(target, min_box_side=2)
    assert {key: kept[key].tolist() for key in PER_BOX if key in kept} == {
        "boxes": [[0, 0, 10, 10]],
        "labels": [0],
        "iscrowd": [0],
        "area": [0],
    }
    assert kept["image_id"] == 4


def test_images_without_objects_pass_every_transform():
    transforms = TrainingTransforms(0.5, 0.5, 1, 1, 1, 1, (60,), (30, 50), (80,))
    for seed in range(10):
        torch.manual_seed(seed)
        image, target = transforms(*sample([]))
        assert min(image.shape[1:]) == 80
        assert target["boxes"].shape == (0, 4)


def test_draws_come_from_torchs_generator_alone():
    transforms = TrainingTransforms(0.5, 0.5, 0.5, 0.5, 0.5, 0.5, (60, 70), (30, 50), (80, 90))
    results = []
    for _ in range(2):
        torch.manual_seed(11)
        results.append([transforms(*sample([[10, 20, 30, 50]]))[0] for _ in range(8)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_photometric_changes_colours_and_not_boxes():
    torch.manual_seed(0)
    image, target = sample([[10, 20, 30, 50]])
    changed, kept = TrainingTransforms(**NOTHING | {"photometric": 1.0})(image, target)
    assert not torch.equal(changed, image)
    assert torch.equal(kept["boxes"], target["boxes"])


@pytest.mark.parametrize("wrong", [{"crop": 1.5}, {"horizontal_flip": -0.1}, {"crop_sides": (50, 40)}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="not"):
        TrainingTransforms(**wrong)
