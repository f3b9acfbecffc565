import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffperception.data import CocoDetection, ShapesSettings, write_shapes
from diffperception.data.shapes import CLASSES, draw_scene

SMALL = ShapesSettings(train=5, val=3)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes") / "deep" / "shapes"
    assert write_shapes(folder, SMALL, workers=1)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("split", "count"), [("train", 5), ("val", 3)])
def test_folder_reads_as_coco_with_masks(drawn, split, count):
    dataset = CocoDetection(drawn / "annotations" / f"instances_{split}.json", drawn / split, masks=True)
    assert (len(dataset), dataset.classes) == (count, list(CLASSES))
    for index in range(count):
        scene = draw_scene(np.random.default_rng([0, int(split == "val"), index]), SMALL)
        image, target = dataset[index]
        np.testing.assert_array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), scene.image)
        np.testing.assert_array_equal(target["boxes"].numpy(), scene.boxes)
        np.testing.assert_array_equal(target["labels"].numpy(), scene.labels)
        np.testing.assert_array_equal(
            target["area"].numpy(), [(scene.owner == i).sum() for i in range(len(scene.boxes))]
        )
        owned = scene.owner == np.arange(len(scene.boxes))[:, None, None]
        np.testing.assert_array_equal(target["masks"].numpy(), owned)
        mask = np.asarray(Image.open(drawn / "masks" / split / dataset.file_names[index]))
        np.testing.assert_array_equal(mask, scene.class_mask)


def test_images_of_one_object_lie_in_folders_of_its_class(tmp_path):
    write_shapes(tmp_path / "shapes", ShapesSettings(train=8, val=0, max_objects=1), workers=1)
    dataset = CocoDetection(tmp_path / "shapes" / "annotations" / "instances_train.json", tmp_path / "shapes" / "train")
    for name, (_, target) in zip(dataset.file_names, dataset, strict=True):
        assert [dataset.classes[label] for label in target["labels"]] == [Path(name).parent.name]
        assert (tmp_path / "shapes" / "masks" / "train" / name).is_file()


def test_annotation_ids_are_unique(drawn):
    content = json.loads((drawn / "annotations" / "instances_train.json").read_text())
    ids = [entry["id"] for entry in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))


def test_any_number_of_workers_draws_the_same_files(drawn, tmp_path):
    assert write_shapes(tmp_path / "again", SMALL, workers=2)
    assert files(tmp_path / "again") == files(drawn)


def test_the_same_again_is_left_as_it_is(drawn):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    assert not write_shapes(drawn, SMALL)
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_a_folder_with_something_else_is_refused_and_kept(drawn, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        write_shapes(drawn, ShapesSettings(train=6, val=3))
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(ValueError, match="something else"):
        write_shapes(tmp_path, SMALL)
    with pytest.raises(ValueError, match="is a file"):
        write_shapes(tmp_path / "thesis.txt", SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_an_empty_folder_is_filled(drawn, tmp_path):
    (tmp_path / "empty").mkdir()
    write_shapes(tmp_path / "empty", SMALL, workers=1)
    assert files(tmp_path / "empty") == files(drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_stopping_midway_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffperception.data.shapes_dataset.write_json", stop)  # once the images are drawn
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "shapes", SMALL, workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"train": -1}, {"train": 0, "val": 0}, {"max_objects": 0}, {"min_side": 200}, {"min_size": 90}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ShapesSettings(**wrong)
