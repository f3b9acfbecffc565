import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffperception.cli.main import main
from diffperception.data.formats import open_annotations
from diffperception.data.formats.conversion import convert_annotations
from tests.data.formats.conftest import objects, random_coco

NAMES = ["leer.png", "a b.jpg", "straße/日本.png", "straße/tief/a b.png", "x.y.z.JPG"]
CLASSES = ["Hund", "hund", "日本語", "two words", "a:b, c"]


@pytest.fixture
def coco(tmp_path: Path, draw) -> Any:
    """Writes a random COCO file with its images; returns its path, its content and the images' folder."""

    def make(seed: int) -> tuple[Path, dict[str, Any], Path]:
        images = draw(*NAMES, folder="pictures")
        content = random_coco(seed, NAMES, CLASSES)
        path = tmp_path / f"coco_{seed}.json"
        path.write_text(json.dumps(content))
        return path, content, images

    return make


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_a_way_to_and_back_keeps_every_box_every_class_and_every_image(tmp_path: Path, coco, format, seed):
    path, content, images = coco(seed)
    convert_annotations(path, tmp_path / "made", images, to=format)
    source = tmp_path / "made" if format == "voc" else tmp_path / "made" / "data.yaml:train"
    convert_annotations(Path(source), tmp_path / "back.json", images, format=format)
    back = json.loads((tmp_path / "back.json").read_text())
    assert [category["name"] for category in back["categories"]] == CLASSES
    assert sorted(image["file_name"] for image in back["images"]) == sorted(NAMES)
    assert {(image["width"], image["height"]) for image in back["images"]} == {(64, 48)}
    before, after = objects(content), objects(back)
    assert [found[:2] for found in after] == [found[:2] for found in before]
    difference = np.subtract([box for *_, box in before], [box for *_, box in after])
    assert np.abs(difference).max() < 1e-3  # asked for: half a pixel


def test_crowd_regions_become_difficult_and_come_back(tmp_path: Path, coco):
    path, content, images = coco(0)
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    convert_annotations(path, tmp_path / "voc", images, to="voc")
    back = open_annotations(tmp_path / "voc", images, "voc")
    assert [a["bbox"] for a in back.content["annotations"] if a["iscrowd"]] == [
        pytest.approx(content["annotations"][1]["bbox"], abs=1e-3)
    ]
    assert any("difficult" in note and ": 1," in note for note in back.notes)
    made = convert_annotations(path, tmp_path / "yolo", images, to="yolo")
    assert made.notes == ["crowd regions, which YOLO does not know, are left out: 1"]
    assert made.num_objects == len(content["annotations"]) - 1
    assert len(open_annotations(tmp_path / "yolo", images, "yolo").content["annotations"]) == made.num_objects


def test_files_of_others_stay_and_names_stay_in_the_folder(tmp_path: Path, draw):
    content = random_coco(0, ["../../leave.png", "b.png"], ["a"])
    path = tmp_path / "in" / "coco.json"
    path.parent.mkdir()
    path.write_text(json.dumps(content))
    convert_annotations(path, tmp_path / "deep" / "er" / "voc", to="voc")
    made = {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.xml")}
    assert made == {"deep/er/voc/Annotations/leave.xml", "deep/er/voc/Annotations/b.xml"}
    mine = tmp_path / "deep" / "er" / "voc" / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        convert_annotations(path, mine.parent, to="voc")
    convert_annotations(path, mine.parent, to="voc", overwrite=True)
    assert mine.read_text() == "mine"
    with pytest.raises(ValueError, match=r"coco\.json is what is to be converted"):
        convert_annotations(path, path)
    with pytest.raises(ValueError, match="can have no label file of its name"):
        convert_annotations(path, tmp_path / "yolo", to="yolo")


@pytest.mark.parametrize(("to", "ending"), [("yolo", "txt"), ("voc", "xml")])
def test_images_that_would_share_a_file_are_refused_before_any_is_written(tmp_path: Path, to, ending):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(random_coco(0, ["a.png", "a.jpg"], ["x"])))
    with pytest.raises(ValueError, match=rf"a\.png and a\.jpg would share the file a\.{ending}"):
        convert_annotations(path, tmp_path / "made", to=to)
    assert not list(tmp_path.rglob(f"*.{ending}"))


def test_the_command_says_what_it_left_out_and_where_the_images_are(tmp_path: Path, draw, write, capsys):
    images = draw("a.jpg", "b.jpg")
    write("labels/a.txt", "0 0.5 0.5 0.5 0.5\n7 0.5 0.5 0.1 0.1\n")
    write("classes.txt", "cat\n")
    output = str(tmp_path / "made.json")
    assert main(["convert-data", "--annotations", str(tmp_path), "--output", output]) == 0
    said = capsys.readouterr().out
    assert "objects of a class that the 1 names do not number are left out: 1, the first is" in said
    assert "images without a label file have no objects: 1, the first is b.jpg" in said
    assert "1 object of 1 class in 2 images" in said
    assert str(images) in said
    assert json.loads(Path(output).read_text())["annotations"][0]["bbox"] == [16, 12, 32, 24]


@pytest.mark.parametrize(
    ("files", "format"),
    [
        ({"a.xml": "<annotation></annotation>"}, "voc"),
        ({"deep/er/a.xml": "<annotation></annotation>"}, "voc"),
        ({"Annotations/a.xml": "<annotation></annotation>"}, "voc"),
        ({"annotations.xml": "<annotations></annotations>"}, "cvat"),
        ({"a.json": '{"version": "5", "shapes": []}'}, "labelme"),
        ({"_annotations.coco.json": "{}"}, None),
        ({"export.json": '[{"id": 1, "annotations": []}]'}, "labelstudio"),
        ({"results.json": '[{"image_id": 1, "bbox": [1, 2, 3, 4]}]'}, None),
        ({"data.yaml": "names: [a]"}, "yolo"),
        ({"labels/a.txt": ""}, "yolo"),
    ],
)
def test_another_format_than_coco_is_named(tmp_path: Path, write, files, format):
    for name, text in files.items():
        write(f"data/{name}", text)
    match = f"seems to be of the format {format}, not coco" if format else "is not a COCO annotation file"
    with pytest.raises(ValueError, match=match):
        open_annotations(tmp_path / "data")


def test_a_format_that_is_not_clear_has_to_be_named(tmp_path: Path, write):
    path = write("a.bin", "?")
    with pytest.raises(ValueError, match="is not clear: name one of coco, voc"):
        open_annotations(path, format="auto")
    with pytest.raises(FileNotFoundError, match="there is no annotation file or folder"):
        open_annotations(tmp_path / "absent", format="auto")


def test_a_box_over_the_border_moves_no_other_on_the_way_to_voc_and_back(tmp_path: Path, coco):
    path, content, images = coco(0)
    content["annotations"][0]["bbox"][0] = -1
    path.write_text(json.dumps(content))
    convert_annotations(path, tmp_path / "voc", images, to="voc")
    back = objects(open_annotations(tmp_path / "voc", images, "voc").content)
    difference = np.subtract([box for *_, box in objects(content)], [box for *_, box in back])
    assert np.abs(difference).max() < 1e-3


def test_a_folder_of_images_that_is_not_there_is_named_and_classes_that_are_not_used(tmp_path: Path, coco):
    path, _, images = coco(0)
    with pytest.raises(FileNotFoundError, match=r"there is no image folder .*nope"):
        convert_annotations(path, tmp_path / "a.json", tmp_path / "nope")
    made = convert_annotations(path, tmp_path / "b.json", images, classes=["x"])
    assert any("so --classes is not used" in note for note in made.notes)
