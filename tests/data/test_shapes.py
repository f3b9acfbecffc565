import re
from typing import Any

import numpy as np
import pytest

from diffperception.data.shapes import (
    CLASSES,
    COLORS,
    MIN_SIDE,
    MIN_VISIBLE,
    PAIRS,
    SHAPES,
    Shape,
    ShapesSettings,
    draw_scene,
)
from diffperception.data.shapes_captions import CHINESE, RELATIONS, describe_scene

# The first scene, before there were captions.
LABELS = [5, 0, 5, 3, 5]
BOXES = [[74, 29, 95, 53], [53, 101, 109, 151], [114, 19, 137, 62], [0, 0, 41, 28], [61, 48, 90, 86]]


def scene(index: int, **settings: int):
    return draw_scene(np.random.default_rng([0, 0, index]), ShapesSettings(**settings))


@pytest.mark.parametrize("name", CLASSES)
def test_outline_encloses_the_stated_area(name):
    u, v = np.meshgrid(np.linspace(-1.2, 1.2, 1200), np.linspace(-1.2, 1.2, 1200))
    outline, area = SHAPES[name]
    assert (outline(u, v) < 0).mean() * 2.4**2 == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("name", CLASSES)
def test_outline_is_about_a_distance(name):
    """Its slope is 1 wherever it is smooth, so that edges are one pixel soft."""
    step = 0.01
    axis = np.arange(-1.5, 1.5, step) + step / 2
    dv, du = np.gradient(SHAPES[name][0](*np.meshgrid(axis, axis)), step)
    assert (abs(np.hypot(du, dv) - 1) < 0.05).mean() > 0.95


def test_boxes_are_the_bounds_of_visible_pixels():
    for index in range(30):
        drawn = scene(index)
        assert drawn.owner.max() == len(drawn.labels) - 1
        for i, (x1, y1, x2, y2) in enumerate(drawn.boxes):
            visible = drawn.owner == i
            outside = visible.copy()
            outside[y1:y2, x1:x2] = False
            assert not outside.any()
            part = visible[y1:y2, x1:x2]
            assert part[0].any()
            assert part[-1].any()
            assert part[:, 0].any()
            assert part[:, -1].any()
            assert min(part.shape) >= MIN_SIDE


def test_class_mask_shows_each_objects_class():
    for index in range(10):
        drawn = scene(index)
        expected = np.zeros(drawn.owner.shape, dtype=np.uint8)
        for i, label in enumerate(drawn.labels):
            expected[drawn.owner == i] = label + 1
        np.testing.assert_array_equal(drawn.class_mask, expected)


def test_every_object_stays_recognisable(monkeypatch):
    """No scene shows less than the least visible share of a shape's whole area."""
    placed: list[Shape] = []
    random = Shape.random.__func__

    def spy(cls, *arguments):
        placed.append(random(cls, *arguments))
        return placed[-1]

    monkeypatch.setattr(Shape, "random", classmethod(spy))
    for index in range(20):
        placed.clear()
        drawn = scene(index)
        for i, label in enumerate(drawn.labels):
            visible = (drawn.owner == i).sum()
            assert any(shape.label == label and visible >= MIN_VISIBLE * shape.area() for shape in placed)


def test_scenes_vary():
    scenes = [scene(index) for index in range(60)]
    assert {label for drawn in scenes for label in drawn.labels} == set(range(len(CLASSES)))
    assert {len(drawn.labels) for drawn in scenes} == set(range(4, 9))
    assert len({drawn.image.shape for drawn in scenes}) > 50
    sides = np.concatenate([drawn.boxes[:, 2:] - drawn.boxes[:, :2] for drawn in scenes])
    assert sides.min() < 16
    assert sides.max() > 60
    covered = [
        (drawn.owner[y1:y2, x1:x2] > i).any() for drawn in scenes for i, (x1, y1, x2, y2) in enumerate(drawn.boxes)
    ]
    assert np.mean(covered) > 0.1


def test_an_object_differs_from_what_is_around_it():
    for index in range(20):
        drawn = scene(index, max_objects=1)
        inside = drawn.image[drawn.owner == 0].mean(axis=0)
        outside = drawn.image[drawn.owner < 0].mean(axis=0)
        assert np.linalg.norm(inside - outside) > 30


def test_a_scene_is_a_function_of_its_seed():
    np.testing.assert_array_equal(scene(3).image, scene(3).image)
    assert scene(3).image.shape != scene(4).image.shape or (scene(3).image != scene(4).image).any()


def test_the_first_scene_is_the_same_on_every_machine():
    drawn = scene(0)
    assert drawn.owner.shape == (151, 137)
    assert drawn.boxes.tolist() == [
        [74, 29, 95, 53],
        [53, 101, 109, 151],
        [114, 19, 137, 62],
        [0, 0, 41, 28],
        [61, 48, 90, 86],
    ]
    assert [CLASSES[label] for label in drawn.labels] == ["ring", "ellipse", "ring", "star", "ring"]
    assert drawn.image.mean() == pytest.approx(77.9103, abs=0.01)


def test_settings_are_kept_to():
    for index in range(20):
        drawn = scene(index, min_side=64, max_side=80, max_objects=2, min_size=30)
        assert all(64 <= side <= 80 for side in drawn.owner.shape)
        assert len(drawn.labels) <= 2


def named(index: int, part: bool = False, **settings: Any):
    drawn = ShapesSettings(captions=True, min_side=64, max_side=64, max_objects=3, **settings)
    rng = np.random.default_rng([0, 0, index])
    return draw_scene(rng, drawn, part), rng


def test_scenes_without_captions_are_what_they_have_always_been():
    drawn = scene(0)
    assert drawn.labels.tolist() == LABELS
    assert drawn.boxes.tolist() == BOXES
    assert drawn.colors == ()


def test_shapes_with_captions_have_their_named_colour_and_no_two_are_alike():
    palette = np.array(list(COLORS.values()))
    for index in range(20):
        drawn, _ = named(index)
        assert len({*zip(drawn.colors, drawn.labels.tolist(), strict=True)}) == len(drawn.labels)
        for i, color in enumerate(drawn.colors):
            median = np.median(drawn.image[drawn.owner == i], axis=0) / 255
            nearest = np.linalg.norm(palette / palette.max(1, keepdims=True) - median / median.max(), axis=1).argmin()
            assert list(COLORS)[nearest] == color


def test_what_is_held_out_is_in_that_part_alone():
    pairs = ["red star", "blue ring", "white ring"]
    for index in range(30):
        for part in (False, True):
            drawn, _ = named(index, part, held_out=pairs)
            shown = {f"{c} {CLASSES[label]}" for c, label in zip(drawn.colors, drawn.labels, strict=True)}
            assert bool(shown & {*pairs}) is part


def test_captions_are_true_in_both_languages():
    relations = 0
    for index in range(40):
        drawn, rng = named(index)
        centers = (drawn.boxes[:, :2] + drawn.boxes[:, 2:]) / 2
        things = [f"{c} {CLASSES[label]}" for c, label in zip(drawn.colors, drawn.labels, strict=True)]
        place = dict(zip(things, centers, strict=True))
        captions = describe_scene(rng, drawn)
        assert len(captions) == 5
        for caption in captions:
            words = caption["en"]
            told = [f"{c} {s}" for c, s in re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(CLASSES)})", words)]
            assert {*told} <= {*things}
            for chinese, word in ((CHINESE[word], word) for thing in things for word in thing.split()):
                assert words.count(word) == caption["zh"].count(chinese)
            for relation, axis, sign in (("left", 0, 1), ("right", 0, -1), ("above", 1, 1), ("below", 1, -1)):
                if relation in words:
                    relations += 1
                    assert sign * (place[told[1]] - place[told[0]])[axis] > 0
                    assert {"left": "左", "right": "右", "above": "上", "below": "下"}[relation] in caption["zh"]
            if not any(way in words for way in RELATIONS):
                assert {*told} == {*things}
    assert relations > 20


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"held_out": ["red star"]}, "captions to true"),
        ({"captions": True, "held_out": ["pink star"]}, "pink star"),
        ({"captions": True, "held_out": ["star"]}, "star"),
        ({"captions": True, "held_out": list(PAIRS[:30])}, "hold out fewer"),
    ],
)
def test_what_cannot_be_held_out_is_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        ShapesSettings(**wrong)
