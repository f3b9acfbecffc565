"""What is refused or said before training, by the check alike."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from diffperception.data import CocoDetection
from diffperception.data.check import check_coco
from diffperception.data.soundness import resizing
from diffperception.data.transforms import TrainingTransforms
from diffperception.training.recipes.detection import DataOptions

Content = dict
WHOLE = {"crop": 0.0, "short_sides": []}


def all_crowds(content: Content) -> None:
    for entry in content["annotations"]:
        entry["iscrowd"] = 1


def fractions(content: Content) -> None:
    for entry in content["annotations"]:
        entry["bbox"] = [x / 100 for x in entry["bbox"]]


def corners(content: Content) -> None:
    for image in content["images"]:
        image.update(width=100, height=100)
        Image.new("RGB", (100, 100)).save(image["file_name"])
    for entry in content["annotations"]:
        entry["bbox"] = [40, 40, 90, 80]


def outside(content: Content) -> None:
    for entry in content["annotations"]:
        entry["bbox"] = [200, 200, 10, 10]


def flat(content: Content) -> None:
    for entry in content["annotations"]:
        entry["bbox"] = [2, 2, 0, 10]


def empty(content: Content) -> None:
    content["annotations"] = []


def nothing(content: Content) -> None:
    pass


def crowd_and_flat(content: Content) -> None:
    flat(content)
    content["annotations"][0] |= {"bbox": [2, 2, 5, 5], "iscrowd": 1}


def half_outside(content: Content) -> None:
    content["annotations"][0]["bbox"] = [200, 200, 10, 10]


def double_annotations(content: Content) -> None:
    content["annotations"] += [entry | {"bbox": [1, 1, 5, 5]} for entry in content["annotations"]]


def missing_file(content: Content) -> None:
    Path("c.png").unlink()


KINDS = {
    all_crowds: "every annotation is a crowd region",
    fractions: "all boxes lie in 0..1",
    corners: "seem to be written as x1, y1, x2, y2",
    outside: "no object has a box with an area inside its image",
    flat: "no object has a box with an area inside its image",
    crowd_and_flat: "no object has a box with an area inside its image",
    empty: "the file has no annotations",
    missing_file: r"1 of the 3 images of \S+ are missing, first \S+c.png",
    nothing: None,
    half_outside: None,
    double_annotations: None,
}


@pytest.mark.parametrize("change", KINDS, ids=lambda change: change.__name__)
def test_check_and_train_judge_alike(folder, content, save, change, monkeypatch):
    """Exit code of the check and refusal of training go together, whatever is wrong."""
    monkeypatch.chdir(folder)
    change(content)
    path = save(content)
    options = DataOptions(path, folder, path, folder, TrainingTransforms(**WHOLE))
    words = KINDS[change]
    assert bool(check_coco(path, folder).errors) == (words is not None)
    if words is None:
        options.remarks(*options.open())
        return
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        options.remarks(*options.open())


def test_what_learning_leaves_out_is_said(folder, content, save):
    content["annotations"][0]["bbox"] = [200, 200, 10, 10]
    content["annotations"].append({"id": 4, "image_id": 7, "category_id": 10, "bbox": [3, 3, 0, 4]})
    path = save(content)
    options = DataOptions(path, folder, path, folder, TrainingTransforms(**WHOLE))
    said = "\n".join(options.remarks(*options.open()))
    assert "a box lies wholly outside of its image" in said
    assert "annotations[3] (id 4) in a.png: box 3, 3, 0, 4" in said


def test_missing_validation_images_are_counted_where_they_are_skipped(folder, content, save, tmp_path):
    train = save(content)
    content["images"][0]["file_name"] = "gone.png"
    val = tmp_path / "val.json"
    val.write_text(json.dumps(content))
    stops = DataOptions(train, folder, val, folder, TrainingTransforms(**WHOLE))
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 images of \S+val.json are missing, first \S+gone.png"):
        stops.remarks(*stops.open())
    skips = DataOptions(train, folder, val, folder, TrainingTransforms(**WHOLE), on_broken="skip")
    assert ["1 of the 3 images" in remark for remark in skips.remarks(*skips.open())] == [True]


def test_a_validation_file_without_objects_is_named(folder, content, save, tmp_path):
    train, val = save(content), tmp_path / "val.json"
    val.write_text(json.dumps(content | {"annotations": []}))
    options = DataOptions(train, folder, val, folder, TrainingTransforms(**WHOLE))
    (remark,) = options.remarks(*options.open())
    assert remark.endswith("so its score will be undefined")


def test_classes_are_matched_by_name_and_differences_are_named(folder, content, save, tmp_path):
    train, val = save(content), tmp_path / "val.json"
    swapped = json.loads(json.dumps(content))
    swapped["categories"] = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    for entry in swapped["annotations"]:
        entry["category_id"] = {20: 1, 10: 2}[entry["category_id"]]
    val.write_text(json.dumps(swapped))
    learned, scored = DataOptions(train, folder, val, folder, TrainingTransforms(**WHOLE)).open()
    assert scored.classes == learned.classes
    assert scored.labels.tolist() == learned.labels.tolist()
    assert scored.category_ids == [2, 1]
    swapped["categories"][0]["name"] = "wolf"
    val.write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match=r"it has no dog, and only it has wolf"):
        DataOptions(train, folder, val, folder).open()


@pytest.mark.parametrize(("side", "level"), [(9, None), (4, "warning"), (1, "error")])
def test_objects_below_a_pixel_after_resizing_are_counted(folder, content, save, side, level):
    """The images are 40x30, 20x50 and 32x32; objects 10 and 12 pixels wide and high at least."""
    content["annotations"][1]["bbox"] = [5, 5, 5, 5]
    path = save(content)
    transforms = TrainingTransforms(crop=0, short_sides=[side])
    found = {problem.kind: problem.level for problem in CocoDetection(path, folder, transforms).problems}
    assert found.get("objects below a pixel") == level
    checked = {
        problem.kind: problem.level for problem in check_coco(path, short_side=side, max_long_side=1333).problems
    }
    assert checked == found


def test_no_draw_of_the_transforms_enlarges_more_than_the_largest_scale():
    sizes = np.array([[60, 40], [30, 90]])
    transforms = TrainingTransforms(
        crop=0.5, iou_crop=0.3, crop_short_sides=(50, 80), crop_sides=(30, 60), short_sides=(40, 70), max_long_side=120
    )
    bounds = transforms.largest_scale(sizes)
    torch.manual_seed(0)
    largest = np.zeros(2)
    for _ in range(60):
        for row, (width, height) in enumerate(sizes.tolist()):
            box = torch.tensor([[width / 2 - 1, height / 2 - 1, width / 2 + 1, height / 2 + 1.0]])
            boxes = tv_tensors.BoundingBoxes(box, format="XYXY", canvas_size=(height, width))
            image = tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8))
            target = {"boxes": boxes, "labels": torch.zeros(1, dtype=torch.int64)}
            target |= {"iscrowd": torch.zeros(1), "area": torch.ones(1)}
            _, changed = transforms(image, target)
            for x1, y1, x2, y2 in changed["boxes"].tolist():
                largest[row] = max(largest[row], (x2 - x1) / 2, (y2 - y1) / 2)
    assert (largest <= bounds * 1.1).all()  # sides are rounded to whole pixels
    assert (largest > 0.15 * bounds).all()


def test_an_image_one_pixel_wide_keeps_a_pixel():
    for size in ((600, 1), (1, 600), (1, 5000)):
        image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
        boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=size)
        target = {"boxes": boxes, "labels": torch.zeros(0), "iscrowd": torch.zeros(0), "area": torch.zeros(0)}
        for crop in (0, 1):
            changed, _ = TrainingTransforms(crop=crop)(image, target)
            assert min(changed.shape[-2:]) >= 1
            assert max(changed.shape[-2:]) <= 1333


def test_resizing_is_bounded_by_the_long_side():
    assert resizing(np.array([[1600, 1200], [100, 100]]), 192, 256).tolist() == pytest.approx([0.16, 1.92])
    assert resizing(np.array([[1600, 1200]]), None, 256).tolist() == [1]
