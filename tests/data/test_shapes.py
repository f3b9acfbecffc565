import numpy as np
import pytest

from diffperception.data.shapes import (
    CLASSES,
    MIN_SIDE,
    MIN_VISIBLE,
    SHAPES,
    ShapesSettings,
    _Shape,
    draw_scene,
)


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
    placed: list[_Shape] = []
    random = _Shape.random.__func__

    def spy(cls, *arguments):
        placed.append(random(cls, *arguments))
        return placed[-1]

    monkeypatch.setattr(_Shape, "random", classmethod(spy))
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
