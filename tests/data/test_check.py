import copy
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffperception.data import CocoDetection
from diffperception.data.check import check_coco
from diffperception.data.check_report import Problem

from .large_coco import CHECK, LOAD, cost, write_large


def kinds(problems: list[Problem]) -> list[str]:
    return [problem.kind for problem in problems]


def test_a_sound_data_set_has_no_problems(folder, content, save):
    report = check_coco(save(content), folder, num_boxes=3)
    assert report.problems == []
    assert "no errors and no warnings" in report.text()


ENTRY_CHANGES = [
    ("images", {"id": 3}, "double image id", ["3: 2 times"]),
    ("images", {"id": "7b"}, "unusable entry", ["images[0] (id '7b')", "\"id\" is '7b', not a whole number"]),
    ("images", {"id": 7.5}, "unusable entry", ["images[0] (id 7.5)", '"id" is 7.5, not a whole number']),
    ("images", {"id": 2**70}, "unusable entry", ["not a whole number of at most 63 bits"]),
    ("images", {"height": -3}, "unusable entry", ['"height" is -3']),
    ("images", {"file_name": None}, "unusable entry", ['"file_name" is None']),
    ("images", {"file_name": "b.png"}, "double file name", ["b.png: 2 times"]),
    ("annotations", {"id": 2}, "double annotation id", ["2: 2 times"]),
    ("annotations", {"image_id": 99}, "unknown image id", ["annotations[0] (id 1): image id 99"]),
    ("annotations", {"category_id": 99}, "unknown category id", ["annotations[0] (id 1): category id 99"]),
    ("annotations", {"bbox": [1, 2, 0, 5]}, "box without area", ["annotations[0] (id 1) in b.png: box 1, 2, 0, 5"]),
    ("annotations", {"bbox": [1, 2, 5, -5]}, "box without area", ["annotations[0] (id 1) in b.png: box 1, 2, 5, -5"]),
    ("annotations", {"bbox": [30, 2, 5, 5]}, "box outside", ["annotations[0] (id 1) in b.png: box 30, 2, 5, 5"]),
    (
        "annotations",
        {"bbox": [15, 2, 10, 5]},
        "box over the border",
        ["annotations[0] (id 1) in b.png: box 15, 2, 10, 5"],
    ),
    (
        "annotations",
        {"bbox": [-9, 2, 10, 5]},
        "box over the border",
        ["annotations[0] (id 1) in b.png: box -9, 2, 10, 5"],
    ),
    (
        "annotations",
        {"bbox": [1, 2, 3]},
        "unusable entry",
        ["annotations[0] (id 1)", "not a list of four finite numbers"],
    ),
    ("annotations", {"bbox": [1, 2, float("nan"), 4]}, "unusable entry", ["not a list of four finite numbers"]),
    ("annotations", {"bbox": [1, 2, float("inf"), 4]}, "unusable entry", ["not a list of four finite numbers"]),
    ("annotations", {"area": -1}, "unusable entry", ['"area" is -1']),
    ("annotations", {"iscrowd": "no"}, "unusable entry", ["\"iscrowd\" is 'no', not 0 or 1"]),
    ("categories", {"id": 10}, "double category id", ["10: 2 times"]),
    ("categories", {"name": "cat"}, "double category name", ["cat: 2 times"]),
]


@pytest.mark.parametrize(("section", "change", "kind", "texts"), ENTRY_CHANGES)
def test_a_wrong_value_is_named(folder, content, save, section, change, kind, texts):
    content[section][0] |= change
    problems = {problem.kind: problem for problem in check_coco(save(content), folder, open_images=False).problems}
    assert len(problems[kind].places) == 1
    assert all(text in problems[kind].text(shown=1) for text in texts)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        *(("images", key) for key in ("id", "file_name")),
        *(("annotations", key) for key in ("image_id", "category_id", "bbox")),
        *(("categories", key) for key in ("id", "name")),
    ],
)
def test_a_missing_key_is_named(content, save, section, key):
    del content[section][0][key]
    report = check_coco(save(content))
    assert any(f'no "{key}"' in place for problem in report.errors for place in problem.places)


def test_a_file_of_lvis_has_no_problems(content, save):
    for image in content["images"]:
        name = image.pop("file_name")
        image |= {
            "coco_url": f"http://images.cocodataset.org/train2017/{name}",
            "neg_category_ids": [10],
            "not_exhaustive_category_ids": [],
        }
    content["categories"] = [category | {"frequency": "r", "image_count": 1} for category in content["categories"]]
    assert check_coco(save(content)).problems == []


def test_an_entry_that_is_no_object_is_named(content, save):
    content["annotations"].insert(1, 5)
    (problem,) = check_coco(save(content)).problems
    assert problem.places == ["annotations[1]: it is not an object with keys"]


def test_area_and_iscrowd_may_be_left_out(content, save):
    for entry in content["annotations"]:
        del entry["area"], entry["iscrowd"]
    assert check_coco(save(content)).problems == []


def test_several_problems_are_all_found_errors_first(folder, content, save):
    (folder / "a.png").unlink()
    content["images"][1]["width"] = -1
    content["annotations"][1]["category_id"] = 4
    content["annotations"][2]["image_id"] = 99
    content["categories"].append({"id": 77, "name": "unseen"})
    report = check_coco(save(content), folder)
    assert kinds(report.errors) == ["unusable entry", "unknown image id", "unknown category id", "missing image"]
    assert kinds(report.warnings) == ["category without objects"]
    assert kinds(report.problems) == kinds(report.errors) + kinds(report.warnings)


def many_boxes(images: int, rng: np.random.Generator) -> dict:
    """A file of boxes anywhere in their images, written as COCO writes them."""
    low = rng.uniform(0, 80, size=(images * 5, 2))
    high = low + rng.uniform(4, 100 - low)
    boxes = np.concatenate([low, high - low], axis=1).tolist()
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 100} for i in range(images)],
        "annotations": [
            {"id": k, "image_id": k // 5, "category_id": 1, "bbox": box} for k, box in enumerate(boxes, start=0)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


def test_boxes_written_as_corners_are_recognised_and_right_ones_are_not_taken_for_them(save):
    right = many_boxes(20, np.random.default_rng(0))
    assert check_coco(save(right)).problems == []
    corners = copy.deepcopy(right)
    for entry in corners["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [x, y, x + width, y + height]
    assert kinds(check_coco(save(corners)).problems) == ["boxes as corners"]


def test_sloppy_boxes_of_whole_images_are_not_taken_for_corners(save):
    content = many_boxes(20, np.random.default_rng(0))
    for entry in content["annotations"]:
        entry["bbox"] = [1, 2, 101, 99]
    assert kinds(check_coco(save(content)).problems) == ["box over the border"]


def test_boxes_written_as_fractions_are_recognised(save):
    content = many_boxes(5, np.random.default_rng(0))
    for entry in content["annotations"]:
        entry["bbox"] = [number / 100 for number in entry["bbox"]]
    assert kinds(check_coco(save(content)).problems) == ["boxes as fractions"]


def test_more_objects_than_proposals_are_counted_without_crowds(content, save):
    content["annotations"] += [content["annotations"][0] | {"id": 10 + k} for k in range(3)]
    (problem,) = check_coco(save(content), num_boxes=3).problems
    assert (problem.kind, problem.level, problem.places) == (
        "more objects than proposals",
        "warning",
        ["image 3: 4 objects"],
    )
    assert check_coco(save(content), num_boxes=4).problems == []


@pytest.mark.parametrize(
    ("emptied", "expected"),
    [
        (["annotations"], ["no annotations"]),
        (["images", "annotations"], ["no images", "no annotations"]),
        (["categories", "annotations"], ["no categories", "no annotations"]),
    ],
)
def test_emptiness_is_an_error(content, save, emptied, expected):
    report = check_coco(save(content | {section: [] for section in emptied}))
    assert kinds(report.errors) == expected


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "list", "no categories"])
def test_an_unreadable_file_is_one_error(content, save, damage):
    path = save(content)
    text = path.read_text()
    damaged = {
        "empty": "",
        "cut": text[: len(text) // 2],
        "list": "[]",
        "no categories": json.dumps({key: content[key] for key in ("images", "annotations")}),
    }
    path.unlink()
    if damage in damaged:
        path.write_text(damaged[damage])
    report = check_coco(path)
    assert kinds(report.problems) == ["unreadable file"]
    assert str(path) in report.text()


def test_image_files_are_opened_and_named(folder, content, save):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:-30])
    Image.new("RGB", (50, 20)).save(folder / "b.png")
    (folder / "c.png").unlink()
    report = check_coco(save(content), folder)
    places = {problem.kind: problem.places for problem in report.errors}
    assert list(places) == ["missing image", "broken image", "image size"]
    assert places["missing image"] == [str(folder / "c.png")]
    assert "a.png" in places["broken image"][0]
    assert "b.png is 50x20, not 20x50" in places["image size"][0]
    assert "EXIF" in places["image size"][0]
    assert kinds(check_coco(save(content), folder, open_images=False).errors) == ["missing image"]
    assert kinds(check_coco(save(content), folder / "nowhere").errors) == ["no image folder"]


def test_long_lists_are_shortened_with_a_count_and_whole_in_the_json(content, save):
    content["annotations"] = [content["annotations"][0] | {"id": k, "category_id": 5} for k in range(47)]
    report = check_coco(save(content))
    text = report.text(shown=10)
    assert "(47 times)" in text
    assert "and 37 more" in text
    assert "annotations[9] (id 9):" in text
    assert "annotations[10]" not in text
    assert len(json.loads(json.dumps(asdict(report)))["problems"][0]["places"]) == 47


def test_summary_counts(content, save):
    summary = check_coco(save(content)).summary
    assert summary is not None
    assert (summary.images, summary.objects, summary.crowds, summary.images_without_objects) == (3, 3, 1, 1)
    assert [(entry.name, entry.objects, entry.images) for entry in summary.classes] == [("cat", 2, 2), ("dog", 1, 1)]
    assert summary.objects_per_image == (0, 1, 2)
    assert summary.box_width[1] == 20
    assert summary.box_sizes == (3, 0, 0)
    assert summary.image_sizes == ("20x50", "40x30")


@pytest.mark.parametrize(("section", "change", "kind", "texts"), ENTRY_CHANGES)
def test_what_the_check_calls_sound_can_be_loaded(folder, content, save, section, change, kind, texts):
    """And what cannot be loaded is an error of the check."""
    content[section][0] |= change
    path = save(content)
    has_errors = bool(check_coco(path, folder, open_images=False).errors)
    try:
        CocoDetection(path, folder)
    except ValueError:
        assert has_errors


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOAD, CHECK], ids=["load", "check"])
def test_a_file_of_cocos_size_fits_in_memory(tmp_path: Path, code):
    write_large(tmp_path / "large.json")
    _, gigabytes = cost(code, tmp_path / "large.json")
    assert gigabytes < 3
