import json
import re
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from diffperception.data.annotations import labels_of
from diffperception.data.outlines import decode_outlines
from diffperception.detection.evaluator import CocoEvaluator, CocoResult
from diffperception.detection.results import describe_results
from tests.helpers.coco_cases import as_predictions, boxes, item, random_case, write_coco

BCCD = Path(__file__).parents[3] / "shared/data/bccd/annotations/instances_test.json"


def score(path: Path, predicted: list[int], predictions: list[dict[str, Tensor]], **options: Any) -> CocoResult:
    evaluator = CocoEvaluator(path, **options)
    evaluator.update(predicted, predictions)
    return evaluator.compute()


def test_ground_truth_as_predictions_scores_one(tmp_path):
    objects = [
        item(0, 5, 10, 10, 50, 40),  # no area, no iscrowd, annotation id 0
        item(0, 5, 20, 15, 50, 40),
        item(0, 5, 10, 10, 50, 40),  # the same box twice
        item(0, 5, 0.1, 0.2, 33.3, 77.7, iscrowd=1, area=9.0),
        item(0, 5, 5, 5, 120, 100, iscrowd=1, area=12000),
        item(1, 2, 30, 30, 0, 20, area=0),  # cannot be found by any box
        item(1, 2, 30, 30, 20, 20, area=10),
        item(1, 9, 60, 60, 200, 200, area=40000),
    ]
    path = write_coco(tmp_path / "a.json", objects, images=3, category_ids=[9, 5, 2])
    result = score(path, *as_predictions(path))
    assert set(result.per_class.values()) == {1.0}
    assert {result.metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")} == {1.0}
    assert result.objects == {"class 2": 1, "class 5": 3, "class 9": 1}
    assert result.explanation is None
    assert any("1 objects" in note for note in result.notes)


def test_ground_truth_of_real_photographs_scores_one():
    if not BCCD.exists():
        pytest.skip("the BCCD photographs are not here (../shared/data/bccd)")
    result = score(BCCD, *as_predictions(BCCD))
    assert result.metrics["AP"] == 1.0
    assert set(result.per_class) == {"RBC", "WBC", "Platelets"}


def test_hand_computed_average_precision(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10), item(1, 1, 0, 0, 10, 10)], 2, [1])
    # In order of score: found, missed, found. Precision is 1 up to recall 1/2 (51 of 101 points), then 2/3.
    predictions = [boxes((0, 0, 10, 10), (100, 100, 110, 110), scores=[0.9, 0.8]), boxes((0, 0, 10, 10), scores=[0.7])]
    assert score(path, [0, 1], predictions).metrics["AP"] == pytest.approx(
        (51 * 1 + 50 * 2 / 3) / 101, abs=1e-12, nan_ok=True
    )
    # An IoU of 0.76 counts at the six thresholds 0.50 to 0.75 of ten.
    result = score(path, [0, 1], [boxes((0, 0, 10, 7.6)), boxes((0, 0, 10, 7.6))])
    assert result.metrics["AP"] == pytest.approx(0.6, abs=1e-12, nan_ok=True)
    assert result.metrics["AP50"] == result.metrics["AP75"] == 1.0


def reference_stats(path: Path, rows: list[dict[str, Any]], iou_type: str, max_dets: int) -> list[float]:
    """What pycocotools says, in the order of our metrics."""
    truth = COCO(str(path))
    reference = COCOeval(truth, truth.loadRes(json.loads(json.dumps(rows))), iou_type)
    reference.params.maxDets = [1, 10, max_dets]
    reference.evaluate()
    reference.accumulate()
    precision, recall = reference.eval["precision"][..., 2], reference.eval["recall"]
    parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., k] for k in (1, 2, 3))]
    parts += [recall[:, :, 0, limit] for limit in range(3)]
    return [part[part > -1].mean() if (part > -1).any() else np.nan for part in parts]


@pytest.mark.parametrize(("seed", "max_dets"), [(0, 100), (1, 100), (2, 500)])
def test_agrees_with_pycocotools(tmp_path, seed, max_dets):
    path, image_ids, predictions = random_case(tmp_path, seed=seed)
    result = score(path, image_ids, predictions, max_dets=max_dets)
    assert 0.1 < result.metrics["AP"] < 0.9
    expected = reference_stats(path, result.detections, "bbox", max_dets)
    assert list(result.metrics.values()) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_agrees_with_pycocotools_on_many_detections_of_equal_scores(tmp_path):
    path, image_ids, predictions = random_case(tmp_path, images=4)
    for prediction in predictions:
        for name, value in prediction.items():
            prediction[name] = value.repeat(40, *[1] * (value.dim() - 1))  # hundreds per image, many as sure as others
        prediction["scores"] = (prediction["scores"] * 7).round() / 7
    for max_dets in (100, 300):
        result = score(path, image_ids, predictions, max_dets=max_dets)
        expected = reference_stats(path, result.detections, "bbox", max_dets)
        assert list(result.metrics.values()) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def with_outlines(path: Path) -> Path:
    """Ellipses in the boxes; crowds as run lengths."""
    content = json.loads(path.read_text())
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        points = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], 1)
        annotation["segmentation"] = [points.ravel().tolist()]
        if annotation["iscrowd"]:
            annotation["segmentation"] = json_runs(decode_outlines([annotation["segmentation"]], 300, 400)[0])
    path.write_text(json.dumps(content))
    return path


def json_runs(mask: Tensor) -> dict[str, Any]:
    """Run lengths, not compressed, as COCO has its crowds."""
    flat = mask.T.flatten().tolist()
    changes = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    counts = np.diff([0, *changes, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def ellipses(boxes: Tensor) -> Tensor:
    """Masks (n, 300, 400)."""
    y, x = torch.arange(300)[:, None] + 0.5, torch.arange(400) + 0.5
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    return ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_masks_agree_with_pycocotools(tmp_path, seed):
    path, image_ids, predictions = random_case(tmp_path, images=6, seed=seed)
    with_outlines(path)
    for prediction in predictions:
        prediction["masks"] = ellipses(prediction["boxes"])
    result = score(path, image_ids, predictions, iou_types=("bbox", "segm"))
    of_boxes, of_masks = np.split(np.array(list(result.metrics.values())), 2)
    assert list(result.metrics)[9:] == [f"mask_{name}" for name in list(result.metrics)[:9]]
    assert 0.1 < result.metrics["mask_AP"] < 0.9
    rows = [{name: value for name, value in row.items() if name != "bbox"} for row in result.detections]
    assert of_masks.tolist() == pytest.approx(reference_stats(path, rows, "segm", 100), abs=1e-9, nan_ok=True)
    assert of_boxes.tolist() == pytest.approx(
        list(score(path, image_ids, predictions).metrics.values()), abs=1e-12, nan_ok=True
    )
    (tmp_path / "results.json").write_text(json.dumps(result.detections))
    again = CocoEvaluator(path, iou_types=("bbox", "segm")).score_results(tmp_path / "results.json")
    assert list(again.metrics.values()) == pytest.approx(list(result.metrics.values()), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("wrong", ["bbox", (), ("box",)])
def test_boxes_masks_or_both_are_compared(tmp_path, wrong):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 1, [1])
    with pytest.raises(ValueError, match="iou_types must be some of bbox, segm, not"):
        CocoEvaluator(path, iou_types=wrong)


def test_a_file_without_outlines_has_no_masks_to_score(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 1, [1])
    with pytest.raises(ValueError, match=r"a\.json has no segmentation"):
        CocoEvaluator(path, iou_types=("bbox", "segm"))


def test_order_batches_and_repeated_images_do_not_matter(tmp_path):
    path, image_ids, predictions = random_case(tmp_path)
    expected = score(path, image_ids, predictions)
    evaluator = CocoEvaluator(path)
    for i in torch.randperm(len(image_ids), generator=torch.Generator().manual_seed(3)).tolist():
        evaluator.update([image_ids[i]], [predictions[i]])
    evaluator.update(image_ids[:3], predictions[3:6])  # padding of a distributed sampler: taken before, so ignored
    assert evaluator.compute() == expected
    evaluator.reset()
    assert evaluator.compute().metrics["AP"] == 0


def as_json(result: CocoResult) -> str:
    return json.dumps([result.metrics, result.per_class, result.detections])


def gather_in_process(rank: int, folder: str, path: Path, image_ids: list[int], predictions: list[dict[str, Tensor]]):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    evaluator = CocoEvaluator(path)
    mine = [*range(rank, len(image_ids), 2), 0]  # both processes predict image 0
    evaluator.update([image_ids[i] for i in mine], [predictions[i] for i in mine])
    evaluator.gather()
    Path(folder, f"{rank}.json").write_text(as_json(evaluator.compute()))
    torch.distributed.destroy_process_group()


def test_two_processes_score_as_one(tmp_path):
    path, image_ids, predictions = random_case(tmp_path, images=5)
    alone = CocoEvaluator(path)
    alone.update(image_ids, predictions)
    alone.gather()  # nothing to gather
    result = alone.compute()
    arguments = (str(tmp_path), path, image_ids, predictions)
    torch.multiprocessing.spawn(gather_in_process, arguments, nprocs=2)
    for rank in range(2):
        assert (tmp_path / f"{rank}.json").read_text() == as_json(result)


def test_more_detections_than_100_can_count(tmp_path):
    objects = [item(0, 1, 3 * i, 5 * j, 2, 4) for i in range(15) for j in range(10)]
    path = write_coco(tmp_path / "crowded.json", objects, 1, [1])
    image_ids, predictions = as_predictions(path)
    assert score(path, image_ids, predictions).metrics["AR100"] == pytest.approx(100 / 150)
    crowded = score(path, image_ids, predictions, max_dets=200)
    assert crowded.metrics["AP"] == crowded.metrics["AR200"] == 1.0
    few = score(path, image_ids, predictions, max_dets=3)
    assert few.metrics["AR3"] == pytest.approx(3 / 150)
    with pytest.raises(ValueError, match="at least 1"):
        CocoEvaluator(path, max_dets=0)


def test_images_without_predictions_count_unless_left_out(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(i, 1, 0, 0, 10, 10) for i in range(4)], 4, [1])
    predictions = [boxes((0, 0, 10, 10))] * 2
    result = score(path, [0, 1], predictions)
    assert result.metrics["AR1"] == 0.5
    assert "2 of 4 images were not predicted" in result.table()
    subset = score(path, [0, 1], predictions, image_ids=[0, 1])
    assert subset.metrics["AP"] == 1.0
    assert subset.notes == []


@pytest.mark.parametrize(
    ("image_id", "prediction", "words"),
    [
        (0, boxes(), "no box was predicted in any of the 1 images"),
        (77, boxes((0, 0, 10, 10)), "none of the predicted image ids is in a.json (77 is predicted, 0 is in the file)"),
        (0, boxes((0, 0, 10, 10), label=3), "from 0 to 2"),
        (0, boxes((0, 0, 10, 10), label=-1), "from 0 to 2"),
        (0, boxes((0.25, 0.3, 0.5, 0.6)), "normalised"),
        (0, boxes((100, 90, 40, 30)), "x1, y1, x2, y2"),
        (0, boxes((float("nan"), 90, 40, 30)), "diverged"),
        (0, boxes((200, 190, 240, 230)), "the best IoU within a class is 0.00"),
    ],
)
def test_says_why_ap_is_zero(tmp_path, image_id, prediction, words):
    path = write_coco(tmp_path / "a.json", [item(0, c, 100, 90, 40, 30) for c in (1, 2, 3)], 1, [1, 2, 3])
    result = score(path, [image_id], [prediction])
    assert result.metrics["AP"] == 0
    assert words in result.explanation
    assert result.explanation in result.table()


def test_says_that_some_box_meets_an_object_where_ap_is_nearly_zero(tmp_path):
    objects = [item(0, 1, 20 * (i % 20), 20 * (i // 20), 10, 10) for i in range(200)]
    found = boxes((0, 0, 10, 5.2), *[(0, 250, 10, 260)] * 3, scores=[0.1, 0.9, 0.9, 0.9])
    result = score(write_coco(tmp_path / "a.json", objects, 1, [1]), [0], [found])
    assert 0 < result.metrics["AP"] < 5e-4
    assert result.explanation.startswith("AP is nearly 0, though some box meets an object of its class")


def test_says_that_labels_are_counted_from_one(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, c, 100, 90, 40, 30) for c in range(1, 21)], 1, list(range(1, 21)))
    image_ids, predictions = as_predictions(path)
    predictions[0]["labels"] += 1
    predictions[0]["boxes"] += 200 * predictions[0]["labels"][:, None]
    assert "from 0 to 19" in score(path, image_ids, predictions).explanation


def test_says_why_ap_is_undefined(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 9, 9, iscrowd=1)], 1, [1])
    result = score(path, [0], [boxes((0, 0, 10, 10))])
    assert isnan(result.metrics["AP"])
    assert "no object to find" in result.explanation
    assert "nan" not in result.table()


def test_says_that_nothing_was_predicted(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 9, 9)], 1, [1])
    assert "no image was predicted" in CocoEvaluator(path).compute().explanation


def test_a_results_file_scores_as_the_predictions_it_was_written_from(tmp_path, capsys):
    path, image_ids, predictions = random_case(tmp_path)
    result = score(path, image_ids, predictions)
    results = tmp_path / "results.json"
    results.write_text(json.dumps(result.detections))
    again = CocoEvaluator(path).score_results(results)
    assert again.metrics == result.metrics
    assert again.detections == result.detections
    assert {row["category_id"] for row in result.detections} == {3, 7, 90}
    assert capsys.readouterr().out == ""


def test_table_shows_every_class_and_metric(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 1, [1, 2])
    table = score(path, [0], [boxes((0, 0, 10, 10))]).table()
    assert "AR100" in table
    assert [line.split() for line in table.splitlines() if line.startswith("class ")] == [
        ["class", "AP", "objects"],
        ["class", "1", "1.000", "1"],
        ["class", "2", "-", "0"],
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [("[]", "must hold the lists"), ('{"images": [', "cut short"), ('{"images": []}', "must hold the lists")],
)
def test_bad_annotation_files_are_named(tmp_path, content, words):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        CocoEvaluator(path)
    assert "bad.json" in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        CocoEvaluator(tmp_path / "nowhere.json")


@pytest.mark.parametrize("content", ["{}", '[{"image_id": 1}]', '[{"image_id": 0, "category_id": 1, "bbox": [1], "s'])
def test_bad_results_files_are_named(tmp_path, content):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 1, [1])
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        CocoEvaluator(path).score_results(tmp_path / "results.json")


def test_categories_of_the_same_name_stay_apart():
    """Exports of Roboflow hold an unused category 0 that is named like the first one."""
    assert labels_of([1, 0, 4], ["fish", "fish", "crab"]) == ([0, 1, 4], ["fish (id 0)", "fish (id 1)", "crab"])


ROW = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": ...}, 'it has no "image_id"'),
        ({"score": ...}, 'it has no "score"'),
        ({"image_id": 9}, '"image_id" is 9, which the annotation file does not list'),
        ({"category_id": 0}, '"category_id" is 0, which the annotation file does not list'),
        ({"image_id": "first"}, "\"image_id\" is 'first', not a whole number"),
        ({"image_id": 0.5}, '"image_id" is 0.5, not a whole number'),
        ({"bbox": [1, 2, 3]}, '"bbox" is [1, 2, 3], not a list of four finite numbers'),
        ({"bbox": None}, '"bbox" is None'),
        ({"bbox": [0, 0, float("inf"), 3]}, '"bbox" is [0, 0, inf, 3]'),
        ({"bbox": [5, 5, -2, 3]}, '"bbox" is [5, 5, -2, 3], not a list of four finite numbers: x, y, and width'),
        ({"score": float("nan")}, '"score" is nan, not a finite number'),
        ({"score": "high"}, "\"score\" is 'high', not a finite number"),
        ({"score": [0.5]}, '"score" is [0.5]'),
        (None, "it is not an object with keys"),
        ([0, 1, 2], "it is not an object with keys"),
    ],
)
def test_a_wrong_row_of_a_results_file_is_named_with_its_number(tmp_path, change, words):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 2, [1])
    wrong = {k: v for k, v in (ROW | change).items() if v is not ...} if isinstance(change, dict) else change
    (tmp_path / "results.json").write_text(json.dumps([ROW, ROW, wrong]))
    with pytest.raises(ValueError, match=rf"results\.json, row 3: {re.escape(words)}"):
        CocoEvaluator(path).score_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"annotations": [ROW]}, "holds an object (annotations), but a results file is a list of rows"),
        ({"1": [ROW], "2": []}, "holds an object (1, 2), but a results file is a list of rows"),
        ({}, "holds an object (empty), but a results file is a list of rows"),
        ("rows", "but a results file is a list of rows"),
        ([[ROW]], "row 1: it is not an object with keys"),
    ],
)
def test_results_in_another_form_are_refused_with_what_is_expected(tmp_path, content, words):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 1, [1])
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(words)):
        CocoEvaluator(path).score_results(tmp_path / "results.json")


def test_numbers_as_text_in_a_results_file_are_numbers_and_equal_rows_stay(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 1, [1])
    text = {"image_id": "0", "category_id": "1.0", "bbox": ["0", "0", "10", "10"], "score": "0.9"}
    (tmp_path / "results.json").write_text(json.dumps([text, text]))
    result = CocoEvaluator(path).score_results(tmp_path / "results.json")
    assert result.metrics["AP"] == 1.0
    assert result.detections == [ROW, ROW]


def test_an_empty_results_file_scores_zero_and_that_is_said(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 1, 0, 0, 10, 10)], 1, [1])
    (tmp_path / "results.json").write_text("[]")
    result = CocoEvaluator(path).score_results(tmp_path / "results.json")
    assert result.metrics["AP"] == 0
    assert "results.json has no rows" in result.table()


@pytest.mark.parametrize("counts", ["garbage", "", "1", [0, 5], [0, "x"], None])
def test_masks_of_a_results_file_are_checked(tmp_path, counts):
    objects = [item(0, 1, 0, 0, 10, 10, segmentation=[[0, 0, 10, 0, 10, 10, 0, 10]])]
    path = write_coco(tmp_path / "a.json", objects, 1, [1])
    row = ROW | {"segmentation": {"size": [300, 400], "counts": counts}}
    (tmp_path / "results.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=r'results\.json, row 1: "segmentation" is .*, not run lengths'):
        CocoEvaluator(path, iou_types=("bbox", "segm")).score_results(tmp_path / "results.json")


def described(folder: Path, names: dict[int, str], classes: dict[int, str], rows: list[dict[str, Any]]) -> Path:
    """A results file of `predict` and the images.json beside it."""
    images = [{"id": number, "file_name": name, "width": 400, "height": 300} for number, name in names.items()]
    content = describe_results(images, list(classes), list(classes.values()), "predictions.json", "ids")
    folder.mkdir()
    (folder / "images.json").write_text(json.dumps(content))
    (folder / "predictions.json").write_text(json.dumps(rows))
    return folder / "predictions.json"


def test_ids_of_predict_are_found_by_the_names_of_files_and_classes(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 5, 0, 0, 10, 10), item(1, 3, 20, 20, 30, 30)], 2, [3, 5])
    rows = [
        {"image_id": 2, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 2, "bbox": [20, 20, 30, 30], "score": 0.9},
        {"image_id": 3, "category_id": 2, "bbox": [20, 20, 30, 30], "score": 0.9},
    ]
    names, classes = {1: "part/1.png", 2: "part/0.png", 3: "part/other.png"}, {1: "class 5", 2: "class 3"}
    result = CocoEvaluator(path).score_results(described(tmp_path / "out", names, classes, rows))
    assert result.metrics["AP"] == 1.0
    assert "Image ids are found by file name and classes by name" in result.table()
    assert "1 of 3 predicted images are not in a.json" in result.table()


@pytest.mark.parametrize(
    ("names", "classes", "words"),
    [
        ({1: "x.png"}, {1: "class 3", 2: "class 5"}, "none of the images of"),
        ({1: "0.png"}, {1: "class 3", 2: "class 7"}, "it has no class 7, and only it has class 5"),
        ({1: "0.png", 2: "./0.png"}, {1: "class 3", 2: "class 5"}, None),
    ],
)
def test_predictions_of_other_images_or_classes_are_refused(tmp_path, names, classes, words):
    path = write_coco(tmp_path / "a.json", [item(0, 5, 0, 0, 10, 10)], 1, [3, 5])
    rows = [{"image_id": 1, "category_id": 2, "bbox": [0, 0, 10, 10], "score": 0.9}]
    results = described(tmp_path / "out", names, classes, rows)
    if words is None:
        assert CocoEvaluator(path).score_results(results).metrics["AP"] == 1.0
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        CocoEvaluator(path).score_results(results)


def test_another_images_json_beside_results_is_left_alone(tmp_path):
    path = write_coco(tmp_path / "images.json", [item(0, 1, 0, 0, 10, 10)], 1, [1])
    (tmp_path / "predictions.json").write_text(json.dumps([ROW]))
    assert CocoEvaluator(path).score_results(tmp_path / "predictions.json").metrics["AP"] == 1.0


def test_labels_follow_the_names_of_classes(tmp_path):
    path = write_coco(tmp_path / "a.json", [item(0, 5, 0, 0, 10, 10)], 1, [3, 5])
    found = boxes((0, 0, 10, 10), label=0)
    assert score(path, [0], [found]).metrics["AP"] == 0
    assert score(path, [0], [found], classes=["class 5", "class 3"]).metrics["AP"] == 1.0


def test_areas_that_are_none_count_as_those_of_the_boxes(tmp_path):
    objects = [item(0, 1, 0, 0, 10, 10, area=area) for area in (float("nan"), None, "100")]
    path = write_coco(tmp_path / "a.json", objects, 1, [1])
    metrics = score(path, *as_predictions(path)).metrics
    assert metrics["APs"] == 1.0
    assert isnan(metrics["APm"])
    assert isnan(metrics["APl"])
