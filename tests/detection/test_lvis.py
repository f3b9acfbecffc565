import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffperception.detection.evaluator import CocoEvaluator, CocoResult
from diffperception.detection.lvis import LvisEvaluator

from .test_evaluation import as_predictions, boxes, item, random_case

needs_lvis = pytest.mark.skipif(
    importlib.util.find_spec("lvis") is None,
    reason="the lvis package is not installed: it brings OpenCV, so `make test` does without; pip install -e '.[lvis]'",
)


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
    evaluator = LvisEvaluator(path, **options)
    evaluator.update(image_ids, predictions)
    return evaluator.compute()


@needs_lvis
@pytest.mark.parametrize(("max_dets", "classes_at_a_time"), [(300, 100), (4, 2)])
def test_agrees_with_the_lvis_package_fed_with_files(tmp_path, monkeypatch, max_dets, classes_at_a_time):
    import lvis

    monkeypatch.setattr("diffperception.detection.lvis.CLASSES_AT_A_TIME", classes_at_a_time)
    path, image_ids, predictions = random_case(tmp_path)
    content = json.loads(path.read_text())
    random = np.random.default_rng(1)
    lists = [{i: random.choice([3, 7, 90], 1).tolist() for i in image_ids} for _ in range(2)]
    for annotation in content["annotations"]:
        annotation.pop("iscrowd")  # LVIS has none
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
    path.write_text(json.dumps(content))
    as_lvis(path, *lists)
    result = score(path, image_ids, predictions, max_dets=max_dets)
    assert not hasattr(np, "float")  # what the package needs of numpy is taken back

    monkeypatch.setattr(np, "float", float, raising=False)
    rows = [{**row} for row in result.detections]
    truth = lvis.LVIS(str(path))
    reference = lvis.LVISEval(truth, lvis.LVISResults(truth, rows, max_dets), "bbox")
    reference.params.max_dets = max_dets  # it names the recall
    reference.run()
    expected = reference.get_results()
    assert 0.1 < result.metrics["AP"] < 0.9
    assert {"APr", "APc", "APf"} < result.metrics.keys()
    for name, value in result.metrics.items():
        assert value == pytest.approx(expected[name.replace("AR", "AR@")], abs=1e-9), name


@needs_lvis
def test_ground_truth_as_predictions_scores_one_in_every_group(tmp_path):
    path = small_file(tmp_path)
    result = score(path, *as_predictions(path))
    assert {result.metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APr", "APc", "AR300")} == {1.0}
    assert np.isnan(result.metrics["APf"])
    assert result.per_class["class 1"] == result.per_class["class 2"] == 1.0
    assert result.explanation is None


@needs_lvis
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


@needs_lvis
def test_the_best_of_all_classes_in_an_image_count(tmp_path):
    path = small_file(tmp_path, negative={0: [2]})
    image = {
        "boxes": torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 0]),
    }
    assert score(path, [0], [image], max_dets=2).metrics["APr"] == 1.0
    assert score(path, [0], [image], max_dets=1).metrics["APr"] == 0.0
    assert LvisEvaluator(path).max_dets == 300


@needs_lvis
def test_nothing_predicted_is_explained(tmp_path):
    result = score(small_file(tmp_path), [0], [boxes()])
    assert result.metrics["AP"] == 0
    assert "no box was predicted" in result.explanation


@needs_lvis
def test_a_results_file_and_a_part_of_the_images(tmp_path):
    path, image_ids, predictions = random_case(tmp_path)
    as_lvis(path)
    chosen = image_ids[::2]
    evaluator = LvisEvaluator(path, image_ids=chosen)
    evaluator.update(chosen, predictions[::2])
    part = evaluator.compute()
    (tmp_path / "results.json").write_text(json.dumps(part.detections))
    assert LvisEvaluator(path, image_ids=chosen).score_results(tmp_path / "results.json").metrics == part.metrics
    assert part.notes == []


@needs_lvis
@pytest.mark.parametrize(("section", "key"), [("images", "neg_category_ids"), ("categories", "frequency")])
def test_a_file_that_is_not_of_lvis_is_refused(tmp_path, section, key):
    path = small_file(tmp_path)
    content = json.loads(path.read_text())
    del content[section][0][key]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"lvis\.json is not an LVIS annotation file.*--protocol coco"):
        LvisEvaluator(path)


@needs_lvis
def test_the_package_says_nothing(tmp_path, capfd, caplog):
    path = small_file(tmp_path)
    with caplog.at_level(logging.INFO):
        score(path, *as_predictions(path))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_without_the_package_it_is_said_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lvis", None)  # what Python itself puts there to make an import fail
    with pytest.raises(ValueError, match=r"needs the lvis package.*pip install -e '\.\[lvis\]'"):
        LvisEvaluator(small_file(tmp_path))
