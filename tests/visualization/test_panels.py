"""Pictures of labels and of uncertainty: what is where, and in which colour."""

import math

import numpy as np
import torch

from diffperception.visualization.draw import GREY, class_colour
from diffperception.visualization.panels import (
    contact_sheet,
    legend,
    mask_overlay,
    segmentation_panels,
    uncertainty_map,
)

LABELS = torch.tensor([[0, 1], [2, 255]])


def test_an_overlay_leaves_class_0_and_colours_the_others() -> None:
    image = torch.rand(3, 2, 2)
    picture = mask_overlay(image, LABELS)
    assert torch.equal(picture[:, 0, 0], image[:, 0, 0])
    for (row, column), colour in {(0, 1): class_colour(1), (1, 0): class_colour(2), (1, 1): GREY}.items():
        away = torch.tensor(colour) / 255 - image[:, row, column]
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


def test_a_legend_has_the_colours_of_all_classes() -> None:
    pixels = np.asarray(legend([f"class {k}" for k in range(23)]))
    assert all((pixels == class_colour(k)).all(-1).any() for k in range(1, 23))


def test_a_contact_sheet_has_rows() -> None:
    panel = legend(["a", "b"])
    assert contact_sheet([panel] * 4).height > 1.9 * panel.height
    assert contact_sheet([panel] * 4).width == contact_sheet([panel] * 2).width
