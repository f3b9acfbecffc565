from pathlib import Path

import pytest

from diffperception.data.formats import open_annotations
from tests.data.formats.conftest import objects

HALF = "0 0.5 0.5 0.5 0.5\n"  # of an image of 64 x 48: x 16, y 12, 32 wide, 24 high
BOX = [16, 12, 32, 24]


def names(content) -> list[str]:
    return [image["file_name"] for image in content["images"]]


LAYOUTS = {
    "ultralytics": ("{split}/images/{name}", "{split}/labels/{stem}.txt", "{split}/images"),
    "by kind": ("images/{split}/{name}", "labels/{split}/{stem}.txt", "images/{split}"),
    "roboflow": ("{split}/images/{name}", "{split}/labels/{stem}.txt", "../{split}/images"),
    "beside": ("{split}/{name}", "{split}/{stem}.txt", "{split}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("listed", ["[cat, Dog]", "{0: cat, 1: Dog}"])
def test_the_layouts_of_a_data_yaml(tmp_path: Path, draw, write, layout, listed):
    image, label, folder = LAYOUTS[layout]
    for split, name in (("train", "a b.jpg"), ("train", "tief/ü.png"), ("valid", "c.jpg")):
        draw(image.format(split=split, name=name), folder="data")
        write("data/" + label.format(split=split, stem=name.rsplit(".", 1)[0]), HALF)
    parts = "\n".join(f"{key}: {folder.format(split=s)}" for key, s in (("train", "train"), ("val", "valid")))
    yaml = write("data/data.yaml", f"{parts}\nnc: 2\nnames: {listed}\n")
    train = open_annotations(f"{yaml}:train", format="yolo")
    assert [Path(name).name for name in names(train.content)] == ["a b.jpg", "ü.png"]
    assert [found[1:] for found in objects(train.content)] == [("cat", BOX)] * 2
    assert [category["name"] for category in train.content["categories"]] == ["cat", "Dog"]
    assert all((train.images / name).is_file() for name in names(train.content))
    val = open_annotations(f"{yaml}:val", format="yolo")
    assert [Path(name).name for name in names(val.content)] == ["c.jpg"]
    assert train.notes == val.notes == []
    with pytest.raises(ValueError, match=r"has several parts: give .*data\.yaml:train, .*data\.yaml:val"):
        open_annotations(yaml, format="yolo")
    with pytest.raises(ValueError, match="has no part test"):
        open_annotations(f"{yaml}:test", format="yolo")


def test_a_path_in_the_yaml_and_lists_of_images(tmp_path: Path, draw, write):
    draw("images/a.jpg", "images/b.jpg", folder="root")
    write("root/labels/a.txt", HALF)
    write("root/train.txt", "./images/a.jpg\nimages/b.jpg\n./images/gone.jpg\n")
    yaml = write("set.yaml", "path: root\ntrain: train.txt\nnames: {0: cat}")
    found = open_annotations(yaml, format="yolo")
    assert names(found.content) == ["images/a.jpg", "images/b.jpg"]
    assert objects(found.content) == [("images/a.jpg", "cat", BOX)]
    assert found.notes == [
        "images that train.txt lists are missing and left out: 1, the first is ./images/gone.jpg",
        "images without a label file have no objects: 1, the first is images/b.jpg",
    ]


def test_darknet(tmp_path: Path, draw, write):
    draw("obj/a.jpg", "obj/b.jpg", folder="data")
    write("data/obj/a.txt", "1 0.5 0.5 0.5 0.5\n")
    write("data/obj/b.txt", "")
    write("data/train.txt", "data/obj/a.jpg\ndata/obj/b.jpg\n")
    write("data/obj.names", "cat\nDog\n")
    obj = write("data/obj.data", "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    found = open_annotations(obj, format="yolo")
    assert [(Path(name).name, label, box) for name, label, box in objects(found.content)] == [("a.jpg", "Dog", BOX)]
    assert (len(found.content["images"]), found.notes) == (2, [])


@pytest.mark.parametrize("given", ["", "labels", "images"])
def test_folders_of_images_and_labels_with_a_list_of_classes(tmp_path: Path, draw, write, given):
    draw("a.jpg", folder="data/images")
    write("data/labels/a.txt", HALF)
    write("data/labels/ghost.txt", HALF)
    write("data/classes.txt", "cat\n")
    found = open_annotations(tmp_path / "data" / given, format="yolo")
    assert objects(found.content) == [("a.jpg", "cat", BOX)]
    assert [note.split(":")[0] for note in found.notes] == ["label files without an image are left out"]


def test_polygons_and_rotated_boxes_become_boxes_and_outlines(tmp_path: Path, draw, write):
    draw("a.jpg", folder="data/images")
    write("data/labels/a.txt", "0 0.25 0.5 0.5 0.25 0.75 0.5\n0 0.5 0.25 0.75 0.5 0.5 0.75 0.25 0.5\n" + HALF)
    write("data/classes.txt", "cat\n")
    found = open_annotations(tmp_path / "data", format="yolo", outlines=True)
    assert [a["bbox"] for a in found.content["annotations"]] == [[16, 12, 32, 12], [16, 12, 32, 24], BOX]
    assert [a["area"] for a in found.content["annotations"]] == [192, 384, 768]  # by the triangle, the diamond, the box
    assert found.content["annotations"][0]["segmentation"] == [[16, 24, 32, 12, 48, 24]]
    assert "polygons or rotated boxes are read as the boxes around them: 2, the first is" in found.notes[0]


def test_the_box_of_a_pose_is_taken(tmp_path: Path, draw, write):
    draw("a.jpg", folder="data/images")
    write("data/labels/a.txt", HALF.strip() + " 0.5 0.5 2 0.1 0.1 1\n")
    write("data/data.yaml", "train: images\nkpt_shape: [2, 3]\nnames: [cat]")
    assert objects(open_annotations(tmp_path / "data", format="yolo").content)[0][2] == BOX


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("0 0.5 0.5 0.5\n", r"a\.txt, line 1 has 4 values: an object has 5"),
        ("\n\n0 0.5 0.5 0.5 0.5 0.9\n", r"a\.txt, line 3 has 6 values"),
        ("cat 0.5 0.5 0.5 0.5\n", r"a\.txt, line 1: the class is 'cat', not a number"),
        ("0.5 0.5 0.5 0.5 0.5\n", r"line 1: the class is 0\.5, not a whole number"),
        ("0 0.5 0.5 0.5 inf\n", "line 1: value 5 is 'inf', not a number"),
        ("0 30 20 32 24\n", "line 1: the numbers seem to be pixels"),
    ],
)
def test_a_fault_is_named_with_file_and_line(tmp_path: Path, draw, write, text, match):
    draw("a.jpg", folder="data/images")
    write("data/labels/a.txt", text)
    write("data/classes.txt", "cat\n")
    with pytest.raises(ValueError, match=match):
        open_annotations(tmp_path / "data", format="yolo")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("train: images", "has no `names`"),
        ("names: cat", "names is the text 'cat'"),
        ("names: {1: cat, 2: dog}", "number the classes from 0 to 1"),
        ("names: [cat", r"data\.yaml is not a YAML file"),
    ],
)
def test_a_fault_of_the_yaml_is_named(tmp_path: Path, draw, write, text, match):
    with pytest.raises(ValueError, match=match):
        open_annotations(write("data.yaml", text), format="yolo")


def test_without_a_list_of_classes_it_is_said_what_to_do(tmp_path: Path, draw, write):
    draw("a.jpg", folder="deep/er/and/deeper/images")
    path = write("deep/er/and/deeper/labels/a.txt", HALF).parent
    with pytest.raises(ValueError, match=r"give a data\.yaml with names, or put a classes\.txt"):
        open_annotations(path, format="yolo")


def test_broken_images_are_counted_and_turned_ones_have_their_upright_size(tmp_path: Path, draw, write):
    from PIL import ExifTags, Image

    folder = draw("a.jpg", folder="data/images")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (64, 48)).save(folder / "turned.jpg", exif=exif)
    (folder / "broken.jpg").write_bytes(b"nothing")
    for stem in ("a", "turned", "broken"):
        write(f"data/labels/{stem}.txt", HALF)
    write("data/classes.txt", "cat\n")
    found = open_annotations(tmp_path / "data", format="yolo")
    assert [(i["file_name"], i["width"], i["height"]) for i in found.content["images"]] == [
        ("a.jpg", 64, 48),
        ("turned.jpg", 48, 64),
    ]
    assert "images of unknown size are left out: 1, the first is the image" in found.notes[0]


def test_a_part_that_is_not_there_is_an_error_for_other_images_would_be_taken(tmp_path: Path, draw, write):
    images = draw("a.jpg", folder="data/images/train")
    yaml = write("data/data.yaml", "train: images/train\nval: images/val\nnames: [cat]")
    with pytest.raises(ValueError, match=r"data\.yaml names images/val, which is neither at"):
        open_annotations(f"{yaml}:val", images, "yolo")


def test_parts_outside_of_the_yamls_folder(tmp_path: Path, draw, write):
    images = draw("a.jpg", "b.jpg", folder="elsewhere/images")
    draw("unrelated.jpg", folder="here")
    write("elsewhere/labels/a.txt", HALF)
    yaml = write("here/data.yaml", f"train: {images}\nnames: [cat]")
    found = open_annotations(yaml, format="yolo")
    assert (names(found.content), found.images) == (["a.jpg", "b.jpg"], images)
    assert objects(found.content) == [("a.jpg", "cat", BOX)]


def test_names_of_classes_stay_as_they_are_written_in_the_yaml(tmp_path: Path, draw, write):
    draw("images/a.jpg", folder=".")
    write("labels/a.txt", HALF)
    yaml = write("data.yaml", "train: images\nval: images\ntest: null\nnames: [yes, no, 010, null, 1.0, 2020-01-01]\n")
    content = open_annotations(yaml, format="yolo").content
    classes = [category["name"] for category in content["categories"]]
    assert classes == ["yes", "no", "010", "null", "1.0", "2020-01-01"]


@pytest.mark.parametrize(("listed", "match"), [("[a, b, a]", "have 'a' more than once"), ("[a, '']", "an empty name")])
def test_classes_have_names_of_their_own(tmp_path: Path, draw, write, listed, match):
    draw("images/a.jpg", folder=".")
    write("labels/a.txt", HALF)
    with pytest.raises(ValueError, match=match):
        open_annotations(write("data.yaml", f"train: images\nnames: {listed}\n"), format="yolo")


def test_a_yaml_above_the_data_that_has_names_of_other_things_is_not_taken(tmp_path: Path, draw, write):
    draw("images/a.jpg", folder="project")
    write("project/labels/a.txt", HALF)
    write("services.yaml", "names: [web, db]\n")
    with pytest.raises(ValueError, match=r"no file near .* names the classes"):
        open_annotations(tmp_path / "project", format="yolo")


def test_the_export_of_cvat_whose_obj_data_names_another_folder(tmp_path: Path, draw, write):
    draw("a.jpg", folder="obj_train_data")
    write("obj_train_data/a.txt", HALF)
    write("obj.names", "cat\n")
    write("train.txt", "data/obj_train_data/a.jpg\n")
    data = write("obj.data", "classes = 1\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    assert objects(open_annotations(data, format="yolo").content) == [("obj_train_data/a.jpg", "cat", BOX)]


def test_images_that_share_a_label_file_are_counted(tmp_path: Path, draw, write):
    draw("images/a.jpg", "images/a.png", folder=".")
    write("labels/a.txt", HALF)
    write("classes.txt", "cat\n")
    found = open_annotations(tmp_path, format="yolo")
    assert found.notes == ["images have the label file of another image too: 1, the first is a.png, as a.jpg"]
