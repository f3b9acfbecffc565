"""Scores of tracks: what is perfect, a case computed by hand, and results that cannot be scored."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from diffperception.data.clips import read_clips
from diffperception.detection.tracks_scores import read_tracks, score_tracks

BOX = [2.0, 3.0, 10.0, 8.0]


def truth(folder: Path, tracks: list[list[int]], categories: list[list[int]] | None = None) -> Path:
    """A file of clips with one object in each frame: its track, by clip and frame."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for video, clip in enumerate(tracks, 1):
        for frame, track in enumerate(clip):
            image = {"id": len(images) + 1, "file_name": f"{video}/{frame}.png", "width": 40, "height": 30}
            images.append(image | {"video_id": video, "frame_id": frame})
            category = categories[video - 1][frame] if categories else 1
            row = {"id": image["id"], "image_id": image["id"], "category_id": category, "bbox": BOX, "track_id": track}
            annotations.append(row)
    content = {"videos": [{"id": v} for v in range(1, len(tracks) + 1)], "images": images, "annotations": annotations}
    names = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    (folder / "truth.json").write_text(json.dumps(content | {"categories": names}))
    return folder / "truth.json"


def results(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "tracks.json").write_text(json.dumps(rows))
    return folder / "tracks.json"


def scored(folder: Path, annotations: Path, rows: list[dict[str, Any]]) -> Any:
    table = read_clips(annotations)
    return score_tracks(table, *read_tracks(results(folder, rows), table))


def rows_of(tracks: list[int], category: int = 1, first: int = 1) -> list[dict[str, Any]]:
    row = {"category_id": category, "bbox": BOX, "score": 0.5}
    return [row | {"image_id": image, "track_id": track} for image, track in enumerate(tracks, first)]


def test_the_truth_as_results_is_perfect(tmp_path: Path) -> None:
    annotations = truth(tmp_path, [[1, 1, 2], [9, 9]], [[1, 1, 2], [2, 2]])
    rows = [row | {"score": 0.1} for row in json.loads(annotations.read_text())["annotations"]]
    found = scored(tmp_path, annotations, rows)
    assert found.metrics == pytest.approx(
        {"HOTA": 1, "DetA": 1, "AssA": 1, "LocA": 1, "IDF1": 1, "MOTA": 1, "switches": 0}
    )
    assert found.per_class == pytest.approx({"cat": 1, "dog": 1})
    assert found.notes == []


def test_an_object_whose_track_changes_midway(tmp_path: Path) -> None:
    """Of four boxes, all found, each has the track of one other: an association of 2 / 4, and 2 / (2 + 2)."""
    found = scored(tmp_path, truth(tmp_path, [[7, 7, 7, 7]]), rows_of([1, 1, 2, 2]))
    expected = {"HOTA": math.sqrt(0.5), "DetA": 1, "AssA": 0.5, "LocA": 1, "IDF1": 0.5, "MOTA": 0.75, "switches": 1}
    assert found.metrics == pytest.approx(expected)


def test_what_is_missed_and_what_is_of_another_class(tmp_path: Path) -> None:
    """Two of four are found, and one box more is of a class that is not there: a detection of 2 / 5."""
    found = scored(tmp_path, truth(tmp_path, [[7, 7, 7, 7]]), rows_of([1, 1]) + rows_of([1], category=2, first=3))
    expected = {"HOTA": math.sqrt(0.2), "DetA": 0.4, "AssA": 0.5, "LocA": 1, "IDF1": 4 / 7, "MOTA": 0.25, "switches": 0}
    assert found.metrics == pytest.approx(expected)
    assert found.per_class == pytest.approx({"cat": 0.5, "dog": 0})


def test_tracks_of_two_clips_have_nothing_to_do_with_each_other(tmp_path: Path) -> None:
    annotations = truth(tmp_path, [[1, 1], [1, 1]])
    assert scored(tmp_path, annotations, rows_of([5, 5, 5, 5])).metrics["HOTA"] == pytest.approx(1)
    assert scored(tmp_path, annotations, rows_of([5, 5, 6, 6])).metrics["HOTA"] == pytest.approx(1)


def test_nothing_found_is_zero_and_crowds_are_left_out(tmp_path: Path) -> None:
    annotations = truth(tmp_path, [[1, 1]])
    assert scored(tmp_path, annotations, []).metrics["HOTA"] == 0
    content = json.loads(annotations.read_text())
    content["annotations"][0]["iscrowd"] = 1
    annotations.write_text(json.dumps(content))
    found = scored(tmp_path, annotations, rows_of([3], first=2))
    assert found.metrics["HOTA"] == pytest.approx(1)
    assert found.notes == ["1 objects of truth.json are crowds or have no area: they are left out."]
    content["annotations"] = []
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no object that tracks could be scored on"):
        scored(tmp_path, annotations, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"track_id": None}, 'row 2: "track_id" is None, not a whole number'),
        ({"track_id": 0.5}, 'row 2: "track_id" is 0.5, not a whole number'),
        ({"image_id": 99}, 'row 2: "image_id" is 99, which the annotation file does not list'),
        ({"image_id": 1}, "row 1: track 5 has two boxes in image 1"),
        ({"bbox": [1, 2, -3, 4]}, 'row 2: "bbox" is [1, 2, -3, 4]'),
    ],
)
def test_results_that_cannot_be_scored_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    rows = rows_of([5, 5])
    rows[1] |= change
    with pytest.raises(ValueError, match=re.escape(words)):
        scored(tmp_path, truth(tmp_path, [[7, 7]]), rows)


def test_rows_without_a_track_are_refused(tmp_path: Path) -> None:
    rows = rows_of([5, 5])
    del rows[1]["track_id"]
    with pytest.raises(ValueError, match=re.escape('row 2: it has no "track_id"')):
        scored(tmp_path, truth(tmp_path, [[7, 7]]), rows)
