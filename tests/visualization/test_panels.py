"""Panels: predictions and ground truth, trajectories, labels and their uncertainty: what is where, in which color."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffperception.visualization.draw import class_color
from diffperception.visualization.panels import (
    GREY,
    PANEL_SIDE,
    WRONG,
    contact_sheet,
    legend,
    mask_overlay,
    match_boxes,
    segmentation_panels,
    side_by_side,
    stack,
    titled,
    trajectory,
    uncertainty_map,
)
from tests.visualization.scenes import CLASSES, GREY_IMAGE, detections, has

LABELS = torch.tensor([[0, 1], [2, 255]])


def test_an_overlay_leaves_class_0_and_colors_the_others() -> None:
    image = torch.rand(3, 2, 2)
    picture = mask_overlay(image, LABELS)
    assert torch.equal(picture[:, 0, 0], image[:, 0, 0])
    for (row, column), color in {(0, 1): class_color(1), (1, 0): class_color(2), (1, 1): GREY}.items():
        away = torch.tensor(color) / 255 - image[:, row, column]
        moved = picture[:, row, column] - image[:, row, column]
        torch.testing.assert_close(moved, 0.55 * away)


def test_uncertainty_is_the_brighter_the_larger_up_to_its_most() -> None:
    values = torch.tensor([[0.0, 0.1, 0.3, math.log(2), 1.5]])
    brightness = uncertainty_map(values).sum(0)[0]
    assert brightness[0] < 0.02
    assert brightness[:4].tolist() == sorted(brightness[:4].tolist())
    assert brightness[3] == brightness[4]


def test_panels_show_the_truth_where_it_is_known() -> None:
    image = torch.zeros(3, 2, 2)
    parts = [segmentation_panels(image, LABELS, torch.zeros(2, 2), ["a", "b", "c"], truth) for truth in (None, LABELS)]
    assert parts[1].width > 1.3 * parts[0].width
    assert parts[1].height == parts[0].height


def test_a_legend_has_the_colors_of_all_classes() -> None:
    pixels = np.asarray(legend([f"class {k}" for k in range(23)]))
    assert all((pixels == class_color(k)).all(-1).any() for k in range(1, 23))


def test_a_contact_sheet_has_rows() -> None:
    panel = legend(["a", "b"])
    assert contact_sheet([panel] * 4).height > 1.9 * panel.height
    assert contact_sheet([panel] * 4).width == contact_sheet([panel] * 2).width


def test_matching_takes_each_object_once_and_needs_its_class() -> None:
    target = detections((0, 0, 10, 10), (50, 50, 60, 60), (80, 80, 90, 90), labels=[0, 0, 1])
    found, right = match_boxes(
        target,
        detections(
            (0, 0, 10, 9), (0, 0, 10, 10), (80, 80, 90, 90), (50, 50, 55, 54), labels=[0] * 4, scores=[0.5, 0.9, 1, 1]
        ),
        torch.zeros(3, dtype=torch.bool),
    )
    assert found.tolist() == [True, False, False]
    assert right.tolist() == [False, True, False, False]


def test_misses_and_wrong_boxes_are_red() -> None:
    target = detections((50, 50, 200, 200), (300, 300, 400, 400))
    perfect = side_by_side(GREY_IMAGE, target, target | {"scores": torch.ones(2)}, CLASSES)
    assert not has(perfect, WRONG)
    assert perfect.width == 2 * 640 + 8
    half = detections((50, 50, 200, 200), (500, 10, 600, 90), scores=[0.9, 0.8])
    picture = side_by_side(GREY_IMAGE, target, half, CLASSES)
    left, right = picture.crop((0, 28, 640, 508)), picture.crop((648, 28, 1288, 508))
    assert left.getpixel((302, 300)) == WRONG
    assert right.getpixel((502, 10)) == WRONG
    assert left.getpixel((120, 50)) == right.getpixel((120, 50)) == class_color(0)


def test_crowds_are_neither_found_nor_missed() -> None:
    target = detections((50, 50, 200, 200)) | {"iscrowd": torch.tensor([1])}
    picture = side_by_side(GREY_IMAGE, target, detections(scores=[]), CLASSES)
    assert has(picture, GREY)
    assert not has(picture, WRONG)


@pytest.mark.parametrize(("steps", "columns"), [(1, 3), (2, 4), (4, 6), (50, 6)])
def test_a_trajectory_shows_noise_steps_and_detections(steps: int, columns: int) -> None:
    step = {
        "boxes": torch.tensor([[10.0, 10, 50, 50], [60, 20, 90, 80]]),
        "predicted": torch.tensor([[20.0, 20, 50, 50], [60, 30, 90, 80]]),
        "scores": torch.tensor([0.1, 0.9]),
        "labels": torch.tensor([0, 1]),
    }
    trace = [{"t": t, **step} for t in np.linspace(999, 249, steps).astype(int).tolist()]
    found = detections((20, 20, 50, 50), scores=[0.9])
    panel = trajectory(torch.rand(3, 90, 120), trace, found, CLASSES)
    assert panel.width >= columns * PANEL_SIDE + (columns - 1) * 8
    assert panel.width < (columns + 1) * PANEL_SIDE


def test_boxes_of_lower_scores_are_fainter() -> None:
    scores = torch.tensor([0.0, 0.5, 1.0])
    step = {"t": 9, "boxes": torch.tensor([[10.0, y, 100, y + 20] for y in (40, 80, 120)]), "scores": scores}
    step |= {"predicted": step["boxes"], "labels": torch.zeros(3, dtype=torch.int64)}
    panel = trajectory(torch.zeros(3, PANEL_SIDE, PANEL_SIDE), [step], detections(scores=[]), CLASSES)
    drawn = [panel.getpixel((50, 28 + y)) for y in (40, 80, 120)]  # below the title
    assert drawn == [tuple(int(w * part) for part in class_color(0)) for w in (0.12, 0.56, 1.0)]


def test_panels_are_stacked_without_cutting() -> None:
    pictures = [Image.new("RGB", (30, 10), (1, 2, 3)), Image.new("RGB", (20, 40), (4, 5, 6))]
    assert stack(pictures, gap=5).size == (55, 40)
    assert stack(pictures, vertical=True, gap=5).size == (30, 55)
    assert titled(pictures[0], "a title longer than the picture").width > 200


def test_what_has_no_labels_has_no_overlay() -> None:
    image = torch.rand(3, 2, 2)
    assert torch.equal(mask_overlay(image, torch.zeros(2, 2, dtype=torch.int64)), image)
