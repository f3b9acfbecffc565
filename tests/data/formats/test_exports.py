"""CVAT, Label Studio, LabelMe, CSV, and COCO as these and Roboflow write it."""

import json
from pathlib import Path

import pytest

from diffperception.data.formats import open_annotations
from tests.data.formats.conftest import objects

CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels><label><name>zebra</name></label><label><name>Ant</name></label>
</labels></task></meta>{images}</annotations>"""
CVAT_IMAGE = '<image id="{id}" name="{name}" width="64" height="48">{shapes}</image>'
CVAT_BOX = '<box label="{label}" xtl="1.5" ytl="2" xbr="11.5" ybr="12"{more}></box>'


def test_cvat_reads_boxes_polygons_and_rotated_boxes_in_the_order_of_its_labels(tmp_path: Path, draw, write):
    draw("sub/a.jpg", "b.jpg")
    shapes = [
        CVAT_BOX.format(label="Ant", more=' occluded="1"'),
        '<polygon label="zebra" points="1.0,2.0;5.0,2.0;5.0,9.0"></polygon>',
        CVAT_BOX.format(label="zebra", more=' rotation="90"'),
        '<points label="zebra" points="1,2"></points>',
    ]
    images = CVAT_IMAGE.format(id=0, name="sub/a.jpg", shapes="".join(shapes))
    images += CVAT_IMAGE.format(id=1, name="b.jpg", shapes="") + CVAT_IMAGE.format(id=2, name="gone.jpg", shapes="")
    path = write("annotations.xml", CVAT.format(images=images))
    found = open_annotations(path, format="cvat", outlines=True)
    assert [category["name"] for category in found.content["categories"]] == ["zebra", "Ant"]
    boxes = [a["bbox"] for a in found.content["annotations"]]
    assert boxes == [[1.5, 2, 10, 10], [1, 2, 4, 7], [1.5, 2, 10, 10]]
    assert found.content["annotations"][1]["area"] == 14
    assert [image["file_name"] for image in found.content["images"]] == ["b.jpg", "sub/a.jpg"]
    assert [note.split(":")[0] for note in found.notes] == [
        "rotated boxes are read as the boxes around them",
        "shapes of the kind points are left out",
        "images of the file that are missing are left out",
    ]


@pytest.mark.parametrize(
    ("images", "match"),
    [
        ('<track id="0"></track>', "is CVAT's format for videos"),
        (
            CVAT_IMAGE.format(id=3, name="a.jpg", shapes='<box label="Ant" xtl="1"></box>'),
            r"image 3 \(a.jpg\), box 1: ytl",
        ),
        (CVAT_IMAGE.format(id=3, name="a.jpg", shapes='<polygon label="Ant" points="1,2;3"/>'), "no three points"),
    ],
)
def test_faults_of_cvats_files_are_named(tmp_path: Path, draw, write, images, match):
    with pytest.raises(ValueError, match=match):
        open_annotations(write("annotations.xml", CVAT.format(images=images)), format="cvat")


def region(kind: str, value: dict, **more) -> dict:
    return {"id": "r", "type": kind, "value": value, "original_width": 64, "original_height": 48, **more}


PERCENT = {"x": 25, "y": 25, "width": 50, "height": 50}


def task(image: str, *regions: dict, **more) -> dict:
    return {"id": 1, "data": {"image": image}, "annotations": [{"result": list(regions)}], **more}


def test_label_studio_reads_percents_and_finds_images_by_all_their_names(tmp_path: Path, draw):
    images = draw("a b.jpg", "sub/b.jpg", "c.jpg", "d.jpg")
    box = region("rectanglelabels", {**PERCENT, "rotation": 0, "rectanglelabels": ["Cat"]})
    polygon = region("polygonlabels", {"points": [[0, 0], [50, 0], [0, 50]], "polygonlabels": ["dog"]})
    tasks = [
        task("/data/upload/1/0a1b2c3d-a%20b.jpg".replace("%20", " "), box),
        task("/data/local-files/?d=pictures%2Fsub/b.jpg", polygon, region("choices", {"choices": ["good"]})),
        task("s3://bucket/c.jpg"),
        {"id": 4, "data": {"image": "http://host/d.jpg"}, "annotations": [{"was_cancelled": True, "result": [box]}]},
        task("/data/upload/1/gone.jpg", box),
    ]
    path = tmp_path / "export.json"
    path.write_text(json.dumps(tasks))
    found = open_annotations(path, images, "labelstudio", outlines=True)
    assert objects(found.content) == [("a b.jpg", "Cat", [16, 12, 32, 24]), ("sub/b.jpg", "dog", [0, 0, 32, 24])]
    assert [image["file_name"] for image in found.content["images"]] == ["a b.jpg", "c.jpg", "d.jpg", "sub/b.jpg"]
    assert found.content["annotations"][1]["segmentation"] == [[0, 0, 32, 0, 0, 24]]
    assert [note.split(":")[0] for note in found.notes] == [
        "answers that are no regions are left out",
        "tasks without an annotation count as images without objects",
        "images of the export that are missing are left out",
    ]


def test_a_turned_box_of_label_studio_turns_about_its_first_corner(tmp_path: Path, draw):
    draw("a.jpg")
    value = {"x": 50, "y": 0, "width": 25, "height": 50, "rotation": 90, "rectanglelabels": ["Cat"]}
    (tmp_path / "export.json").write_text(json.dumps([task("a.jpg", region("rectanglelabels", value))]))
    found = open_annotations(tmp_path / "export.json", format="labelstudio")
    assert objects(found.content) == [("a.jpg", "Cat", [8, 0, 24, 16])]  # 16 x 24 pixels, to the left of x 32
    assert "rotated boxes are read as the boxes around them" in found.notes[0]


def test_the_short_export_of_label_studio(tmp_path: Path, draw):
    draw("a.jpg")
    short = {"image": "/data/upload/a.jpg", "id": 1, "label": [{**PERCENT, "rectanglelabels": ["Cat"]}]}
    short["label"][0] |= {"original_width": 64, "original_height": 48}
    (tmp_path / "min.json").write_text(json.dumps([short]))
    assert objects(open_annotations(tmp_path / "min.json", format="labelstudio").content) == [
        ("a.jpg", "Cat", [16, 12, 32, 24])
    ]


def labelme(image: str, *shapes: dict, **more) -> str:
    content = {"version": "5", "shapes": list(shapes), "imagePath": image, "imageData": "AAAA"}
    return json.dumps(content | {"imageHeight": 48, "imageWidth": 64} | more)


def shape(label: str, points: list[list[float]], kind: str = "polygon", group: int | None = None) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group, "flags": {}}


def test_labelme_reads_shapes_and_joins_groups(tmp_path: Path, draw, write):
    draw("a.jpg", "sub/b.jpg", folder="data")
    text = labelme(
        "a.jpg",
        shape("Cat", [[20, 12], [10, 2]], "rectangle"),
        shape("ring", [[20, 20], [23, 24]], "circle"),
        shape("snake", [[0, 0], [4, 0], [0, 4]], group=7),
        shape("snake", [[10, 10], [14, 10], [10, 14]], group=7),
        shape("tip", [[1, 1]], "point"),
    )
    write("data/a.json", text)
    write("data/sub/b.json", labelme("..\\somewhere\\b.jpg", imageHeight=None))
    write("data/notes.json", "[]")
    found = open_annotations(tmp_path / "data", format="labelme", outlines=True)
    assert objects(found.content) == [
        ("a.jpg", "Cat", [10, 2, 10, 10]),
        ("a.jpg", "ring", [15, 15, 10, 10]),
        ("a.jpg", "snake", [0, 0, 14, 14]),
    ]
    assert found.content["annotations"][2]["area"] == 16
    assert len(found.content["annotations"][2]["segmentation"]) == 2
    assert [(image["file_name"], image["height"]) for image in found.content["images"]] == [
        ("a.jpg", 48),
        ("sub/b.jpg", 48),
    ]
    assert [note.split(":")[0] for note in found.notes] == [
        "shapes of the kind point with 1 points are left out",
        "JSON files without `shapes`, which are not LabelMe's, are left out",
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (labelme("a.jpg", shape("", [])), r"a\.json, shape 1 has no label"),
        (labelme("a.jpg", shape("x", [[1, 2], 3])), "shape 1: its points are no list of pairs"),
        (labelme("a.jpg", shape("x", [[1, "b"], [1, 2], [2, 3]])), "shape 1: a point is 'b', not a number"),
        ("{", r"a\.json is not a JSON file"),
    ],
)
def test_faults_of_labelmes_files_are_named(tmp_path: Path, draw, write, text, match):
    draw("a.jpg", folder="data")
    write("data/a.json", text)
    with pytest.raises(ValueError, match=match):
        open_annotations(tmp_path / "data", format="labelme")


BOX = [10, 2, 20, 30]
TABLES = {
    "keras-retinanet": "a.jpg,10,2,30,32,Cat\nb.jpg,,,,,\n",
    "tensorflow": "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,64,48,Cat,10,2,30,32\nb.jpg,64,48,,,,,\n",
    "sizes": "image;x;y;w;h;label\na.jpg;10;2;20;30;Cat\nb.jpg;;;;;\n",
    "sizes in full": "path\tx\ty\twidth\theight\tlabel\n/home/me/a.jpg\t10\t2\t20\t30\tCat\nb.jpg\t\t\t\t\t\n",
    "a list": 'image_id,width,height,bbox,label\na,64,48,"[10.0, 2.0, 20.0, 30.0]",Cat\nb,64,48,,\n',
    "quoted": '"file","x1","y1","x2","y2","class"\r\n"a.jpg","10","2","30","32","Cat"\r\n"b.jpg","","","","",""\r\n',
}


@pytest.mark.parametrize("table", TABLES)
def test_csv_columns_are_found_by_their_names(tmp_path: Path, draw, write, table):
    draw("a.jpg", "b.jpg", "unlisted.jpg")
    found = open_annotations(write("boxes.csv", TABLES[table]), format="csv")
    assert objects(found.content) == [("a.jpg", "Cat", BOX)]
    assert [image["file_name"] for image in found.content["images"]] == ["a.jpg", "b.jpg"]
    assert found.notes == []


def test_open_images_are_fractions_and_groups_are_crowds(tmp_path: Path, draw, write):
    draw("0001.jpg", folder="train")
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction\n"
    path = write("oi.csv", header + "0001,xclick,/m/01,1,0.25,0.75,0.5,1,0,0,1,0\ngone,x,/m/01,1,0,1,0,1,0,0,0,0\n")
    found = open_annotations(path, tmp_path / "train", "csv")
    assert objects(found.content) == [("0001.jpg", "/m/01", [16, 24, 32, 24])]
    assert found.content["annotations"][0]["iscrowd"] == 1
    assert [note.split(":")[0] for note in found.notes][:2] == [
        "rows whose image is missing are left out",
        "all boxes lie in 0..1 and are read as fractions of the images; files",
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"boxes\.csv is empty"),
        ("name,x,y\na.jpg,1,2\n", r"no column for the image \(filename\) and the box"),
        ("filename,class,xmin,ymin,xmax,ymax\na.jpg,Cat,1,b,3,4\n", r"boxes\.csv, line 2: a side of the box is 'b'"),
        ("filename,class,xmin,ymin,xmax,ymax\na.jpg,,1,2,3,4\n", "line 2 has no class"),
        ("filename,class,xmin,ymin,xmax,ymax\na.jpg,Cat,1,,3,4\n", "line 2: a side of the box is '', not a number"),
        ("filename,class,xmin,ymin,xmax,ymax\nz.jpg,Cat,1,2,3,4\n", "gives no image"),
    ],
)
def test_faults_of_csv_files_are_named(tmp_path: Path, draw, write, text, match):
    draw("a.jpg")
    with pytest.raises(ValueError, match=match):
        open_annotations(write("boxes.csv", text), format="csv")


def coco(*names: str, categories: list[dict] | None = None, category_id: int = 1) -> str:
    return json.dumps(
        {
            "images": [{"id": k, "file_name": name, "width": 64, "height": 48} for k, name in enumerate(names)],
            "annotations": [{"id": 1, "image_id": 0, "category_id": category_id, "bbox": [1, 2, 3, 4]}],
            "categories": categories or [{"id": 1, "name": "Cat"}],
        }
    )


def test_roboflows_file_is_found_in_its_folder_without_the_projects_category(tmp_path: Path, draw, write):
    draw("a.jpg", folder="data/train")
    categories = [{"id": 0, "name": "cells", "supercategory": "none"}]
    categories += [{"id": k, "name": n, "supercategory": "cells"} for k, n in ((1, "RBC"), (2, "WBC"))]
    write("data/train/_annotations.coco.json", coco("a.jpg", categories=categories))
    for path in (tmp_path / "data" / "train", f"{tmp_path / 'data'}:train"):
        found = open_annotations(path)
        assert [category["name"] for category in found.content["categories"]] == ["RBC", "WBC"]
        assert (found.images, len(found.notes)) == (tmp_path / "data" / "train", 1)
    write("data/train/_annotations.coco.json", coco("a.jpg", categories=categories, category_id=0))
    assert len(open_annotations(tmp_path / "data" / "train").content["categories"]) == 3  # an object has it
    with pytest.raises(ValueError, match=r"holds no JSON files: give .*data:train"):
        open_annotations(tmp_path / "data")


def test_names_of_label_studios_coco_files_are_found(tmp_path: Path, draw, write):
    images = draw("1a2b3c4d-a.jpg", "b.jpg")
    path = write("result.json", coco("images\\1a2b3c4d-a.jpg", "/data/local-files/?d=x%2Fb.jpg", "gone.jpg"))
    found = open_annotations(path, images)
    assert [entry["file_name"] for entry in found.content["images"]] == ["1a2b3c4d-a.jpg", "b.jpg", "gone.jpg"]
    assert "images are found under other names than the file's: 2" in found.notes[0]


def test_names_of_labelme_that_are_no_classes_hidden_copies_and_images_without_a_file(tmp_path: Path, draw, write):
    draw("a.jpg", "b.jpg", folder="data")
    text = labelme("a.jpg", *(shape(name, [[2, 3], [20, 30]], "rectangle") for name in ("Cat", "_background_")))
    write("data/a.json", text)
    write("data/.ipynb_checkpoints/a-checkpoint.json", text)
    write("labels.txt", "__ignore__\n_background_\nCat\nDog\n")
    found = open_annotations(tmp_path / "data", format="labelme")
    assert [category["name"] for category in found.content["categories"]] == ["Cat", "Dog"]
    assert objects(found.content) == [("a.jpg", "Cat", [2, 3, 18, 27])]
    assert [note.split(":")[0] for note in found.notes] == [
        "shapes labelled _background_, which is no class, are left out",
        "images without an annotation file are left out",
    ]


def test_rows_of_two_images_are_not_those_of_one(tmp_path: Path, draw, write):
    draw("1.jpg", folder="a")
    path = write("boxes.csv", "filename,xmin,ymin,xmax,ymax,class\na/1.jpg,1,2,30,40,Cat\nb/1.jpg,2,2,9,9,Cat\n")
    with pytest.raises(ValueError, match=r"line 3: b/1\.jpg and a/1\.jpg would both be the image 1\.jpg"):
        open_annotations(path, tmp_path / "a", "csv")


@pytest.mark.parametrize("size", ["0,0", ","])
def test_a_size_that_a_table_leaves_open_is_the_images(tmp_path: Path, draw, write, size):
    draw("a.jpg", folder=".")
    path = write("boxes.csv", f"filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,{size},Cat,10,2,30,32\n")
    content = open_annotations(path, format="csv").content
    assert objects(content) == [("a.jpg", "Cat", BOX)]
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (64, 48)


def test_where_no_image_is_left_it_is_said_why(tmp_path: Path, draw, write):
    draw("a.jpg", folder=".")
    path = write("boxes.csv", "filename,xmin,ymin,xmax,ymax,class\ngone.jpg,1,2,3,4,Cat\n")
    with pytest.raises(ValueError, match=r"gives no image \(rows whose image is missing are left out: 1, the first"):
        open_annotations(path, format="csv")


def test_two_names_of_a_coco_file_are_not_one_image(tmp_path: Path, draw):
    images = draw("b.jpg")
    content = {
        "images": [{"id": k, "file_name": f"{folder}/b.jpg"} for k, folder in enumerate("pq")],
        "annotations": [],
        "categories": [{"id": 1, "name": "Cat"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = open_annotations(tmp_path / "coco.json", images)
    assert [image["file_name"] for image in found.content["images"]] == ["p/b.jpg", "q/b.jpg"]
