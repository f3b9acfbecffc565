"""Clips of shapes: smooth motion, boxes of what is visible, crossings, and files that tools for tracks read."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffperception.data import ShapesSettings, write_shapes
from diffperception.data.clips import read_clips
from diffperception.data.moving_shapes import LEAST_VISIBLE, SPEEDS, draw_clip
from diffperception.data.shapes import MIN_SIDE

SMALL = ShapesSettings(train=0, val=0, clips=2, frames=4, min_side=64, max_side=72)


@pytest.fixture(scope="module")
def clips() -> list:
    settings = ShapesSettings(clips=1, frames=24)
    return [draw_clip(np.random.default_rng([1, k]), settings) for k in range(5)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "shapes"
    assert write_shapes(folder, SMALL, workers=1)
    return folder


def test_objects_move_smoothly_and_keep_their_number_and_class(clips: list) -> None:
    steps = []
    for clip in clips:
        labels: dict[int, int] = {}
        for before, after in pairwise(clip):
            whole = {
                t: box for t, box, v in zip(before.tracks, before.boxes, before.visibility, strict=True) if v > 0.98
            }
            for track, box, label, seen in zip(after.tracks, after.boxes, after.labels, after.visibility, strict=True):
                assert labels.setdefault(track, label) == label
                if track in whole and seen > 0.98:
                    steps.append(np.linalg.norm((box - whole[track]).reshape(2, 2).mean(axis=0)))
    assert max(steps) < SPEEDS[1] + 1.5  # bounds are whole pixels, and shapes turn
    assert np.mean(steps) > 0.5


def test_only_what_can_be_recognised_is_annotated(clips: list) -> None:
    for frame in (frame for clip in clips for frame in clip):
        sides = frame.boxes[:, 2:] - frame.boxes[:, :2]
        assert (frame.visibility >= LEAST_VISIBLE).all()
        assert (frame.visibility <= 1).all()
        assert (sides >= MIN_SIDE).all()
        assert (frame.areas <= sides.prod(axis=1)).all()


def test_some_are_hidden_for_a_while_and_some_come_and_go(clips: list) -> None:
    spans = [[k for k, frame in enumerate(clip) if t in frame.tracks] for clip in clips for t in range(8)]
    spans = [span for span in spans if span]
    assert any(span[-1] - span[0] + 1 > len(span) for span in spans)
    assert any(span[0] > 0 for span in spans)
    assert any(span[-1] < 23 for span in spans)


def test_the_folder_reads_as_clips_of_the_frames_that_were_drawn(drawn: Path) -> None:
    table = read_clips(drawn / "annotations/clips.json")
    clips = table.clips(drawn / "clips")
    assert [len(clip.frames) for clip in clips] == [4, 4]
    frames = draw_clip(np.random.default_rng([SMALL.seed, 3, 1]), SMALL)
    for frame, path, row in zip(frames, clips[1].paths, table.images[1], strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), frame.image)
        own = table.table.annotation_images == table.table.image_ids[row]
        boxes = table.table.boxes[own]
        np.testing.assert_array_equal(np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]), frame.boxes)
        np.testing.assert_array_equal(table.table.areas[own], frame.areas)
    of_clip = [set(table.tracks[np.isin(table.table.annotation_images, clip.image_ids)]) for clip in clips]
    assert not of_clip[0] & of_clip[1]


def test_clips_depend_on_the_seed_alone(drawn: Path, tmp_path: Path) -> None:
    assert not write_shapes(drawn, SMALL)
    assert write_shapes(
        tmp_path / "more", ShapesSettings(train=1, val=0, clips=2, frames=4, min_side=64, max_side=72), 2
    )
    for path in (drawn / "clips").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "more" / path.relative_to(drawn)).read_bytes()


def test_a_data_set_without_clips_knows_nothing_of_them(tmp_path: Path) -> None:
    write_shapes(tmp_path / "plain", ShapesSettings(train=1, val=0, frames=3), workers=1)
    assert not {"clips", "frames"} & json.loads((tmp_path / "plain/shapes.json").read_text()).keys()
    assert not (tmp_path / "plain/clips").exists()


@pytest.mark.parametrize("wrong", [{"clips": -1}, {"clips": 1, "frames": 0}])
def test_impossible_clips_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        ShapesSettings(**wrong)
