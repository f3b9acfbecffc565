"""Boxes, texts and masks on images: where they are, and in which color."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffperception.visualization.draw import _overlap, _place, class_color, draw_detections, save_png
from diffperception.visualization.panels import WRONG
from tests.visualization.scenes import CLASSES, GREY_IMAGE, detections, has


def test_a_box_is_drawn_in_the_color_of_its_class_where_it_is() -> None:
    picture = draw_detections(GREY_IMAGE, detections((100, 200, 300, 400), labels=[1]), CLASSES)
    assert picture.size == (640, 480)
    for point in ((200, 200), (200, 400), (100, 300), (300, 300)):
        assert picture.getpixel(point) == class_color(1)
    assert picture.getpixel((200, 300)) == picture.getpixel((20, 20)) == (128, 128, 128)
    assert not has(picture, class_color(0))


def test_low_scores_are_not_drawn_and_nothing_is_drawn_on_an_image_without_objects() -> None:
    found = detections((10, 10, 90, 90), (200, 200, 300, 300), labels=[0, 1], scores=[0.3, 0.6])
    picture = draw_detections(GREY_IMAGE, found, CLASSES, threshold=0.5)
    assert has(picture, class_color(1))
    assert not has(picture, class_color(0))
    empty = draw_detections(GREY_IMAGE, detections(scores=[]), CLASSES)
    assert np.unique(np.asarray(empty)).tolist() == [128]


def test_small_images_are_enlarged_with_their_boxes() -> None:
    picture = draw_detections(torch.zeros(3, 60, 100), detections((10, 20, 60, 50)), CLASSES)
    assert picture.size == (500, 300)
    assert picture.getpixel((150, 100)) == class_color(0)


def test_large_images_are_made_smaller() -> None:
    picture = draw_detections(torch.zeros(3, 1000, 3200), detections((400, 400, 1200, 1000)), CLASSES)
    assert picture.size == (1600, 500)
    assert picture.getpixel((400, 200)) == class_color(0)


def test_class_colors_differ_and_none_looks_wrong() -> None:
    colors = np.array([class_color(k) for k in range(20)])
    assert len(np.unique(colors, axis=0)) == 20
    assert np.abs(colors - np.array(WRONG)).max(axis=1).min() > 60


def test_texts_of_neighbours_keep_apart() -> None:
    taken: list = []
    for _ in range(4):
        taken.append(_place((100, 100, 200, 200), 60, 18, (640, 480), taken))
    overlaps = [_overlap(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert overlaps == [0.0] * 6
    corner = _place((600, 0, 640, 10), 90, 18, (640, 480), [])
    assert corner == (550, 0, 640, 18)


def test_png_files_replace_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    save_png(Image.new("RGB", (4, 4), (9, 9, 9)), path)
    save_png(Image.new("RGB", (8, 4), (9, 9, 9)), path)
    assert Image.open(path).size == (8, 4)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]


def test_masks_are_laid_over_the_image_in_the_colors_of_their_boxes() -> None:
    masks = torch.zeros(1, 480, 640, dtype=torch.bool)
    masks[0, 250:350, 150:250] = True
    picture = draw_detections(GREY_IMAGE, detections((100, 200, 300, 400), labels=[1]) | {"masks": masks}, CLASSES)
    mixed = tuple(round(0.45 * 128 + 0.55 * part) for part in class_color(1))
    inside = picture.getpixel((200, 300))
    assert isinstance(inside, tuple)
    assert max(abs(a - b) for a, b in zip(inside, mixed, strict=True)) <= 1
    assert picture.getpixel((280, 380)) == (128, 128, 128)


def test_where_masks_overlap_that_of_the_best_is_seen() -> None:
    masks = torch.zeros(2, 480, 640, dtype=torch.bool)
    masks[0, 200:300], masks[1, 250:400] = True, True
    found = detections((0, 0, 640, 480), (0, 0, 640, 480), labels=[1, 0], scores=[0.9, 0.8])
    picture = draw_detections(GREY_IMAGE, found | {"masks": masks}, CLASSES)
    for y, label in ((225, 1), (275, 1), (350, 0)):
        mixed = [0.45 * 128 + 0.55 * part for part in class_color(label)]
        pixel = picture.getpixel((320, y))
        assert isinstance(pixel, tuple)
        assert max(abs(a - b) for a, b in zip(pixel, mixed, strict=True)) <= 1


def test_boxes_may_lie_on_their_head_or_outside() -> None:
    picture = draw_detections(GREY_IMAGE, detections((300, 400, 100, 200), (-50, -50, 900, 900)), CLASSES)
    assert picture.size == (640, 480)
