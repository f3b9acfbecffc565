"""Data sets of every format, read where a COCO file is: by training, check, evaluation and prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffperception.data import CocoDetection
from diffperception.data.check import check_coco
from diffperception.data.formats import open_annotations, split_annotations
from diffperception.data.formats.conversion import convert_annotations
from diffperception.detection.evaluator import CocoEvaluator
from diffperception.training.recipes.detection import DataOptions
from tests.data.formats.conftest import random_coco
from tests.data.formats.test_voc import xml

NAMES = [f"{part}/{k}.png" for part in ("a", "b") for k in range(6)]


@pytest.fixture
def coco(tmp_path: Path, draw) -> tuple[Path, Path]:
    """A COCO file of whole numbers, and its images."""
    content = random_coco(1, NAMES, ["cat", "dog"])
    for entry in content["annotations"]:
        x, y, width, height = (int(value) for value in entry["bbox"])
        entry["bbox"] = [x, y, max(width, 1), max(height, 1)]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path, draw(*NAMES)


@pytest.mark.parametrize("format", ["voc", "yolo", "auto"])
def test_samples_of_a_converted_data_set_are_those_of_the_coco_file(tmp_path: Path, coco, format):
    path, images = coco
    convert_annotations(path, tmp_path / "made", images, to="yolo" if format == "yolo" else "voc")
    one, other = CocoDetection(path, images), CocoDetection(tmp_path / "made", images, format=format)
    assert (one.classes, one.file_names, one.image_ids) == (other.classes, other.file_names, other.image_ids)
    for index in range(len(one)):
        (image, target), (same, found) = one[index], other[index]
        assert torch.equal(image, same)
        assert torch.equal(target["labels"], found["labels"])
        torch.testing.assert_close(found["boxes"], target["boxes"], atol=0 if format != "yolo" else 1e-4, rtol=0)


def test_training_reads_two_parts_with_the_classes_of_the_first(tmp_path: Path, draw, write):
    images = draw("a.jpg", "b.jpg")
    row = "{}.jpg,1,2,30,40,{}\n"
    train = write("train.csv", row.format("a", "cat") + row.format("a", "dog"))
    val = write("val.csv", row.format("b", "dog") + row.format("b", "bird"))
    options = DataOptions(train, images, val, images, format="csv")
    learned, scored = options.open()
    assert learned.classes == scored.classes == ["cat", "dog"]
    assert scored.labels.tolist() == [1]
    assert any("unknown class 'bird' are left out: 1" in remark for remark in options.remarks(learned, scored))


def test_images_are_held_out_alike_each_time_and_can_be_scored_again(tmp_path: Path, coco):
    path, images = coco
    options = DataOptions(path, images, val_share=0.25)
    train, val = options.open()
    again = options.open()[1]
    assert (len(train), len(val), again.file_names) == (9, 3, val.file_names)
    assert sorted([*train.file_names, *val.file_names]) == sorted(NAMES)
    assert len(train.boxes) + len(val.boxes) == len(CocoDetection(path, images).boxes)
    assert "3 of 12 images are held out" in options.remarks(train, val)[0]
    assert DataOptions(path, images, val_share=0.25, split_seed=1).open()[1].file_names != val.file_names
    assert val.table is not None
    truth = CocoEvaluator(val.table).truth
    assert (len(truth.images), len(truth.annotations)) == (3, len(val.boxes))


def test_what_is_scored_on_must_be_told_once(coco):
    path, images = coco
    with pytest.raises(ValueError, match=r"give data\.val_annotations, or hold images out"):
        DataOptions(path, images).open()
    with pytest.raises(ValueError, match=r"either data\.val_annotations or data\.val_share"):
        DataOptions(path, images, path, images, val_share=0.1).open()


def test_numbers_as_text_are_split_too(tmp_path: Path, coco):
    path, images = coco
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        entry["image_id"] = str(entry["image_id"])
    path.write_text(json.dumps(content))
    train, val = split_annotations(open_annotations(path, images), 0.5, 0)
    assert len(train.content["annotations"]) + len(val.content["annotations"]) == len(content["annotations"])
    ids = {image["id"] for image in val.content["images"]}
    assert {int(entry["image_id"]) for entry in val.content["annotations"]} <= ids
    assert not ids & {int(entry["image_id"]) for entry in train.content["annotations"]}


def test_check_reads_formats_names_what_was_passed_over_and_another_format(tmp_path: Path, draw, write):
    images = draw("a.jpg", "b.jpg")
    path = write("boxes.csv", "a.jpg,1,2,30,40,cat\ngone.jpg,1,2,3,4,cat\nb.jpg,1,2,300,40,cat\n")
    report = check_coco(path, images, format="csv")
    assert {problem.kind for problem in report.problems} == {"passed over", "box over the border"}
    assert "rows whose image is missing are left out: 1" in report.text()
    (problem,) = check_coco(path, images).problems
    assert "seems to be of the format csv, not coco" in problem.message


def test_check_looks_at_the_images_that_training_would_take(tmp_path: Path, draw, write):
    draw("a.jpg", folder="voc", size=(48, 64))
    write("voc/a.xml", xml("a.jpg", ("cat", "1", "1", "20", "20")))
    kinds = {problem.kind for problem in check_coco(tmp_path / "voc", format="voc").errors}
    assert kinds == {"image size"}


def test_training_says_what_check_warns_of(tmp_path: Path, draw, write):
    images = draw("a.jpg")
    content = {
        "images": [{"id": k, "file_name": "a.jpg"} for k in (1, 2)],
        "annotations": [{"id": 1, "image_id": k, "category_id": 1, "bbox": [1, 2, 30, 40]} for k in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path = write("coco.json", json.dumps(content))
    warnings = {problem.kind for problem in check_coco(path, images).warnings}
    assert {problem.kind for problem in CocoDetection(path, images).problems} == warnings
    assert {"double file name", "double annotation id"} <= warnings


def test_a_perfect_prediction_of_a_voc_folder_scores_all(tmp_path: Path, coco):
    path, images = coco
    convert_annotations(path, tmp_path / "voc", images, to="voc")
    dataset = CocoDetection(tmp_path / "voc", images, format="voc")
    evaluator = CocoEvaluator(tmp_path / "voc", format="voc")
    for index, image_id in enumerate(dataset.image_ids):
        target = dataset.target(index)
        scores = torch.ones(len(target["labels"]))
        boxes = target["boxes"].as_subclass(torch.Tensor)
        evaluator.update([image_id], [{"boxes": boxes, "scores": scores, "labels": target["labels"]}])
    assert evaluator.compute().metrics["AP"] == pytest.approx(1.0)
    assert np.isin(dataset.labels, [0, 1]).all()


def test_results_are_scored_on_images_that_lie_elsewhere_and_what_was_passed_over_is_said(tmp_path: Path, draw, write):
    images = draw("a.jpg", "b.jpg", folder="elsewhere")
    write("data/classes.txt", "cat\n")
    write("data/labels/a.txt", "0 0.5 0.5 0.5 0.5\n9 0.5 0.5 0.1 0.1\n")
    row = {"image_id": 1, "category_id": 1, "bbox": [16, 12, 32, 24], "score": 0.9}
    results = write("results.json", json.dumps([row]))
    found = CocoEvaluator(tmp_path / "data", format="yolo", images=images).score_results(results)
    assert found.metrics["AP"] == 1
    assert any("objects of a class that the 1 names do not number are left out: 1" in note for note in found.notes)
