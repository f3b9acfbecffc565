import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffperception.detection.evaluator import CocoEvaluator, CocoResult
from tests.helpers.coco_cases import as_predictions, boxes, item, random_case


def as_lvis(
    path: Path, negative: dict[int, list[int]] | None = None, partial: dict[int, list[int]] | None = None
) -> Path:
    """Give a COCO file what LVIS has: the classes that are surely absent from an image, or not all annotated there."""
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["neg_category_ids"] = (negative or {}).get(image["id"], [])
        image["not_exhaustive_category_ids"] = (partial or {}).get(image["id"], [])
    for category, frequency in zip(content["categories"], "rcf", strict=False):
        category["frequency"] = frequency
    path.write_text(json.dumps(content))
    return path


def small_file(folder: Path, **lists: dict[int, list[int]]) -> Path:
    """Three images; class 1, rare, is in image 0 and class 2, common, in image 1."""
    content = {
        "images": [{"id": i, "coco_url": f"http://x/val2017/{i}.jpg", "width": 99, "height": 99} for i in range(3)],
        "categories": [{"id": c, "name": f"class {c}"} for c in (1, 2, 3)],
        "annotations": [{"id": 1, **item(0, 1, 0, 0, 10, 10)}, {"id": 2, **item(1, 2, 0, 0, 10, 10)}],
    }
    path = folder / "lvis.json"
    path.write_text(json.dumps(content))
    return as_lvis(path, **lists)


def score(path: Path, image_ids: list[int], predictions: list[dict[str, torch.Tensor]], **options: Any) -> CocoResult:
    evaluator = CocoEvaluator(path, protocol="lvis", **options)
    evaluator.update(image_ids, predictions)
    return evaluator.compute()


def test_ground_truth_as_predictions_scores_one_in_every_group(tmp_path):
    path = small_file(tmp_path)
    result = score(path, *as_predictions(path))
    assert {result.metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APr", "APc", "AR300")} == {1.0}
    assert np.isnan(result.metrics["APf"])
    assert result.per_class["class 1"] == result.per_class["class 2"] == 1.0
    assert result.explanation is None


def test_only_classes_that_were_looked_for_are_judged(tmp_path):
    """A wrong detection of class 1 in image 2, better scored than the right one, by what is known of image 2."""
    predictions = [boxes((0, 0, 10, 10), scores=[0.5]), boxes((0, 0, 10, 10), label=1), boxes((50, 50, 60, 60))]
    unknown = score(small_file(tmp_path), [0, 1, 2], predictions)
    absent = score(small_file(tmp_path, negative={2: [1]}), [0, 1, 2], predictions)
    partial = score(small_file(tmp_path, negative={2: [1]}, partial={2: [1]}), [0, 1, 2], predictions)
    coco = CocoEvaluator(small_file(tmp_path))
    coco.update([0, 1, 2], predictions)
    assert [r.metrics["APr"] for r in (unknown, absent, partial)] == [1.0, 0.5, 1.0]
    assert coco.compute().per_class["class 1"] == 0.5
    assert absent.metrics["AP"] == pytest.approx(0.75)


def test_masks_are_judged_in_images_without_objects(tmp_path):
    path = small_file(tmp_path)
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = [[0, 0, 10, 0, 10, 10, 0, 10]]
    path.write_text(json.dumps(content))
    mask = torch.zeros(1, 99, 99)
    mask[:, :10, :10] = 1
    right, elsewhere = (boxes((0, 0, 10, 10), label=label) | {"masks": mask} for label in (0, 2))
    result = score(path, [0, 2], [right, elsewhere], iou_types=("bbox", "segm"))
    assert [result.metrics[name] for name in ("mask_APr", "mask_APc")] == [1.0, 0.0]


def test_the_best_of_all_classes_in_an_image_count(tmp_path):
    path = small_file(tmp_path, negative={0: [2]})
    image = {
        "boxes": torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 0]),
    }
    assert score(path, [0], [image], max_dets=2).metrics["APr"] == 1.0
    assert score(path, [0], [image], max_dets=1).metrics["APr"] == 0.0
    assert CocoEvaluator(path, protocol="lvis").max_dets == 300


def test_nothing_predicted_is_explained(tmp_path):
    result = score(small_file(tmp_path), [0], [boxes()])
    assert result.metrics["AP"] == 0
    assert "no box was predicted" in result.explanation


def test_a_results_file_and_a_part_of_the_images(tmp_path):
    path, image_ids, predictions = random_case(tmp_path)
    as_lvis(path)
    chosen = image_ids[::2]
    evaluator = CocoEvaluator(path, image_ids=chosen, protocol="lvis")
    evaluator.update(chosen, predictions[::2])
    part = evaluator.compute()
    (tmp_path / "results.json").write_text(json.dumps(part.detections))
    again = CocoEvaluator(path, image_ids=chosen, protocol="lvis").score_results(tmp_path / "results.json")
    assert again.metrics == part.metrics
    assert part.notes == []


@pytest.mark.parametrize(("section", "key"), [("images", "neg_category_ids"), ("categories", "frequency")])
def test_a_file_that_is_not_of_lvis_is_refused(tmp_path, section, key):
    path = small_file(tmp_path)
    content = json.loads(path.read_text())
    del content[section][0][key]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lvis\.json is not an LVIS annotation file.*--protocol coco"):
        CocoEvaluator(path, protocol="lvis")


def test_nothing_is_printed(tmp_path, capfd, caplog):
    path = small_file(tmp_path)
    with caplog.at_level(logging.INFO):
        score(path, *as_predictions(path))
    assert capfd.readouterr() == ("", "")


def test_classes_are_judged_in_portions(tmp_path, monkeypatch):
    path, image_ids, predictions = random_case(tmp_path)
    as_lvis(path, {i: [3, 7, 90][i % 3 :][:1] for i in image_ids}, {i: [3, 7, 90][i % 2 :][:1] for i in image_ids})
    whole = score(path, image_ids, predictions)
    monkeypatch.setattr("diffperception.detection.evaluator.CLASSES_AT_A_TIME", 2)
    assert score(path, image_ids, predictions) == whole
