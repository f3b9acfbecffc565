"""What exporters write into COCO files is read as it is meant, or refused in a sentence, by all alike."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffperception.data import CocoDetection
from diffperception.data.annotations import NO_ID, CocoTable, entry_faults, read_coco, tabulate
from diffperception.data.check import check_coco
from diffperception.detection.evaluator import CocoEvaluator


def changed(content: dict[str, Any], section: str, key: str, values: list[Any]) -> dict[str, Any]:
    """The content with `key` of the entries set to the values, or removed where one is ..."""
    new = copy.deepcopy(content)
    for entry, value in zip(new[section], values, strict=True):
        entry[key] = value
        if value is ...:
            del entry[key]
    return new


def as_text(content: dict[str, Any]) -> dict[str, Any]:
    """All numbers as text, some with a decimal point."""
    new = copy.deepcopy(content)
    for entry in (*new["images"], *new["categories"], *new["annotations"]):
        entry.update({key: str(value) for key, value in entry.items() if isinstance(value, int | float)})
    for number, entry in enumerate(new["annotations"]):
        entry["bbox"] = [str(x) for x in entry["bbox"]]
        entry["image_id"] += ".0" * (number % 2)
    return new


def columns(table: CocoTable) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in vars(table).items() if name != "outlines"}


def test_numbers_as_text_are_numbers(content):
    assert columns(tabulate(as_text(content), "a.json")) == columns(tabulate(content, "a.json"))


@pytest.mark.parametrize(
    ("section", "key", "values", "column", "expected"),
    [
        ("annotations", "area", [..., None, float("nan")], "areas", [120, 205, 1000]),
        ("annotations", "area", ["7", 8, 9.5], "areas", [7, 8, 9.5]),
        ("annotations", "iscrowd", [..., None, "0"], "iscrowd", [False, False, False]),
        ("annotations", "iscrowd", [True, "1", 1.0], "iscrowd", [True, True, True]),
        ("annotations", "id", [..., None, "4"], "annotation_ids", [NO_ID, NO_ID, 4]),
        ("annotations", "id", [2**62, 1.0, -(2**62)], "annotation_ids", [2**62, 1, -(2**62)]),
        ("images", "width", [..., None, "32"], "sizes", [[0, 0], [0, 0], [32, 32]]),
        ("images", "height", [0, "50.0", 32], "sizes", [[0, 0], [20, 50], [32, 32]]),
        ("categories", "name", [5, 0.5], "category_names", ["5", "0.5"]),
    ],
)
def test_what_is_missing_or_written_otherwise_is_read_as_meant(content, section, key, values, column, expected):
    table = tabulate(changed(content, section, key, values), "a.json")
    assert np.asarray(getattr(table, column)).tolist() == expected


UNUSABLE = [
    ("images", "id", 7.5),
    ("images", "id", 2**70),
    ("images", "id", True),
    ("images", "id", None),
    ("images", "id", ...),
    ("images", "file_name", 12),
    ("images", "file_name", ""),
    ("images", "file_name", ...),
    ("images", "width", "640px"),
    ("images", "width", -3),
    ("images", "height", ""),
    ("annotations", "id", 0.5),
    ("annotations", "image_id", ...),
    ("annotations", "image_id", [3]),
    ("annotations", "image_id", "seven"),
    ("annotations", "category_id", None),
    ("annotations", "category_id", ...),
    ("annotations", "bbox", ...),
    ("annotations", "bbox", 5),
    ("annotations", "bbox", None),
    ("annotations", "bbox", {"x": 1, "y": 2, "w": 3, "h": 4}),
    ("annotations", "bbox", [[1, 2, 3, 4]]),
    ("annotations", "bbox", [1, 2, 3]),
    ("annotations", "bbox", [1, 2, None, 4]),
    ("annotations", "bbox", [1, 2, float("inf"), 4]),
    ("annotations", "bbox", "1 2 3 4"),
    ("annotations", "bbox", ["a", 2, 3, 4]),
    ("annotations", "area", -1),
    ("annotations", "area", "large"),
    ("annotations", "area", float("inf")),
    ("annotations", "iscrowd", "no"),
    ("annotations", "iscrowd", 2),
    ("annotations", "iscrowd", []),
    ("categories", "id", "first"),
    ("categories", "name", ...),
    ("categories", "name", None),
    ("categories", "name", ""),
    ("categories", "name", ["cat"]),
]


@pytest.mark.parametrize(("section", "key", "value"), UNUSABLE)
def test_what_cannot_be_used_is_refused_alike_by_training_scoring_and_the_check(
    folder, content, save, section, key, value
):
    values = [entry.get(key, ...) for entry in content[section]]
    path = save(changed(content, section, key, [values[0], value, *values[2:]]))
    report = check_coco(path, folder)
    assert "unusable entry" in [problem.kind for problem in report.errors]
    sentences = set()
    for read in (CocoDetection, lambda path, _: CocoEvaluator(path)):
        with pytest.raises(ValueError, match=re.escape(f"{path} cannot be used: {section}[1]")) as error:
            read(path, folder)
        sentences.add(str(error.value))
    (sentence,) = sentences
    assert f'"{key}"' in sentence


@pytest.mark.parametrize("entry", [None, 5, "a.png", [1, 2], []])
@pytest.mark.parametrize("section", ["images", "annotations", "categories"])
def test_an_entry_that_is_no_object_is_refused_alike(folder, content, save, section, entry):
    content[section].insert(1, entry)
    path = save(content)
    for read in (CocoDetection, lambda path, _: CocoEvaluator(path)):
        with pytest.raises(ValueError, match=re.escape(f"{section}[1]: it is not an object with keys")):
            read(path, folder)
    assert "unusable entry" in [problem.kind for problem in check_coco(path).errors]


@pytest.mark.parametrize("value", [*UNUSABLE, ("images", "width", 0), ("annotations", "bbox", [True, 2, 3, 4])])
def test_columns_and_rules_judge_alike(content, value):
    """The columns are read in one go, the faults are found one by one: both must come to the same."""
    section, key, wrong = value
    new = changed(content, section, key, [wrong, *(entry.get(key, ...) for entry in content[section][1:])])
    if faults := list(entry_faults(new)):
        with pytest.raises(ValueError, match=re.escape(faults[0].sentence())):
            tabulate(new, "a.json")
    else:
        tabulate(new, "a.json")


def test_sizes_that_the_file_does_not_give_come_from_the_images(folder, content, save):
    path = save(changed(changed(content, "images", "width", [..., 0, None]), "images", "height", [30, ..., "0"]))
    dataset = CocoDetection(path, folder)
    assert dataset.sizes.tolist() == [[40, 30], [20, 50], [32, 32]]
    assert dataset[1][0].shape == (3, 50, 20)
    assert not check_coco(path, folder).problems
    assert [problem.kind for problem in check_coco(path).problems] == ["unknown size"]


def test_files_in_utf_16_and_with_a_mark_are_read(tmp_path: Path, content):
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "a.json").write_text(json.dumps(content), encoding=encoding)
        assert read_coco(tmp_path / "a.json") == content


def test_classes_are_ordered_by_name(folder, content, save):
    dataset = CocoDetection(save(content), folder)
    before = [dataset.classes[k] for k in dataset.labels]
    dataset.order_classes(["dog", "cat"])
    assert (dataset.classes, dataset.category_ids) == (["dog", "cat"], [20, 10])
    assert [dataset.classes[k] for k in dataset.labels] == before
    with pytest.raises(ValueError, match=r"it has no bird, and only it has cat"):
        dataset.order_classes(["dog", "bird"])


def test_outlines_that_are_none_are_refused(folder, content, save):
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[1, 2, 11, 2, 11, 14]]
    for outline in (
        [[1, 2, 3, 4]],
        "polygon",
        {"counts": "1"},
        {"size": [50, 20], "counts": "garbage"},
        [[1, 2, "x"] * 2],
    ):
        content["annotations"][0]["segmentation"] = outline
        with pytest.raises(ValueError, match=r'annotations\[0\] \(id 1\): "segmentation" is'):
            CocoDetection(save(content), folder, masks=True)
    content["annotations"][0]["segmentation"] = {"size": [40, 20], "counts": [0, 800]}
    with pytest.raises(
        ValueError, match=r"run lengths of annotations\[0\] .* are 20x40 pixels, but its image is 20x50"
    ):
        CocoDetection(save(content), folder, masks=True)
