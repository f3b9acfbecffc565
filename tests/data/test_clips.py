"""COCO-video files and folders of clips: what is read, in which order, and what is refused in a sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffperception.data.clips import list_clips, read_clips


def content() -> dict[str, Any]:
    """Two clips, their frames out of order; a street with a gap in its frames and an empty yard."""
    return {
        "videos": [{"id": 7, "name": "street"}, {"id": 3, "name": "yard"}],
        "images": [
            {"id": 1, "file_name": "street/c.png", "width": 40, "height": 30, "video_id": 7, "frame_id": 9},
            {"id": 2, "file_name": "street/a.png", "width": 40, "height": 30, "video_id": 7, "frame_index": "2"},
            {"id": 3, "file_name": "yard/a.png", "width": 20, "height": 20, "video_id": 3, "frame_id": 2},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 10], "track_id": 5},
            {"id": 2, "image_id": 2, "category_id": 1, "bbox": [1, 2, 10, 10], "instance_id": 5},
            {"id": 3, "image_id": 2, "category_id": 1, "bbox": [9, 9, 0, 4], "track_id": 6},
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }


def written(folder: Path, entries: Any) -> Path:
    (folder / "clips.json").write_text(json.dumps(entries))
    return folder / "clips.json"


def write_frames(folder: Path, *names: str, size: tuple[int, int] = (8, 6)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size).save(folder / name)


def test_frames_are_in_the_order_of_their_ids_and_tracks_by_either_name(tmp_path: Path) -> None:
    table = read_clips(written(tmp_path, content()))
    street, yard = table.clips(tmp_path)
    assert (street.number, street.name, street.frames, street.image_ids) == (
        7,
        "street",
        ("street/a.png", "street/c.png"),
        (2, 1),
    )
    assert (yard.name, yard.paths) == ("yard", (tmp_path / "yard/a.png",))
    np.testing.assert_array_equal(table.tracks, [5, 5, 6])
    np.testing.assert_array_equal(table.objects, [0, 1])  # the third has no area


def drop(section: str, key: str) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries[section][0].pop(key)


def put(section: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries[section][0].update(values)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda entries: entries.pop("videos"), 'it has no list "videos"'),
        (drop("images", "video_id"), 'images[0] (id 1): it has no "video_id"'),
        (drop("images", "frame_id"), 'images[0] (id 1): it has no "frame_id"'),
        (put("images", frame_id=1.5), 'images[0] (id 1): "frame_id" is 1.5'),
        (put("images", frame_id=2), "two images of video 7 have the frame_id 2"),
        (put("images", video_id=8), "images[0] (id 1): its video_id is 8, but no video has that id"),
        (put("annotations", image_id=44), "44"),
        (drop("annotations", "track_id"), 'annotations[0] (id 1): it has no "track_id"'),
        (put("annotations", image_id=2), "two annotations of image 2 are of track 5"),
        (put("videos", id=3), "two videos have the id 3"),
        (put("videos", name="yard"), "two videos have the name yard"),
        (put("videos", name=["a"]), 'videos[0] (id 7): "name" is'),
        (lambda entries: entries["videos"].append(None), "videos[2]: it is not an object"),
    ],
)
def test_what_is_no_clip_is_refused_in_a_sentence(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], words: str
) -> None:
    entries = content()
    damage(entries)
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read_clips(written(tmp_path, entries))
    assert str(error.value).startswith(str(tmp_path / "clips.json"))
    assert "\n" not in str(error.value)


def test_every_folder_with_frames_is_a_clip_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    write_frames(tmp_path / "b", "f10.png", "f9.png", "f1.png")
    write_frames(tmp_path / "a" / "left", "0.png")
    clips, remark = list_clips(tmp_path)
    assert [(clip.number, clip.name, clip.frames) for clip in clips] == [
        (1, "a/left", ("a/left/0.png",)),
        (2, "b", ("b/f1.png", "b/f9.png", "b/f10.png")),
    ]
    assert remark == ""
    (alone,), _ = list_clips(tmp_path / "b")  # the same names for results and noise
    assert (alone.name, alone.frames, alone.paths) == ("b", clips[1].frames, clips[1].paths)


def test_frames_of_two_sizes_are_no_clip(tmp_path: Path) -> None:
    write_frames(tmp_path / "x", "0.png", "1.png")
    write_frames(tmp_path / "x", "2.png", size=(9, 6))
    (clip,), _ = list_clips(tmp_path)
    with pytest.raises(ValueError, match=r"the frames of clip x differ in size: .*0.png is 8x6 pixels, .*2.png is 9x6"):
        clip.require_one_size()
