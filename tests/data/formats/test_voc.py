import os
from pathlib import Path

import pytest

from diffperception.data.formats import open_annotations
from tests.data.formats.conftest import objects


def xml(name: str, *boxes: tuple[str, ...], size: tuple[int, int] = (64, 48)) -> str:
    things = "".join(
        f"<object><name>{label}</name>{''.join(extra)}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for label, a, b, c, d, *extra in boxes
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}</filename>{sides}{things}</annotation>"


FULL = ("cat", "1", "1", "64", "48")


def test_a_box_from_1_to_the_sides_fills_the_image(tmp_path: Path, draw, write):
    draw("a.jpg", folder="voc/JPEGImages")
    write("voc/Annotations/a.xml", xml("a.jpg", FULL, ("Dog", "11", "2.5", "20", "7.25")))
    content = open_annotations(tmp_path / "voc", format="voc").content
    assert objects(content) == [("a.jpg", "Dog", [10, 1.5, 10, 5.75]), ("a.jpg", "cat", [0, 0, 64, 48])]
    assert [category["name"] for category in content["categories"]] == ["Dog", "cat"]  # capitals sort first


@pytest.mark.parametrize("corner", [0, 0.25])
def test_a_folder_with_a_corner_below_1_counts_from_0_and_it_is_said(tmp_path: Path, draw, write, corner):
    draw("a.jpg", "b.jpg", folder="voc")
    write("voc/a.xml", xml("a.jpg", ("cat", str(corner), "5", "64", "48")))
    write("voc/b.xml", xml("b.jpg", ("cat", "10", "5", "20", "10")))
    found = open_annotations(tmp_path / "voc", format="voc")
    assert [box for *_, box in objects(found.content)] == [[corner, 5, 64 - corner, 43], [10, 5, 10, 5]]
    assert any("counted from 0" in note for note in found.notes)


def test_xml_files_of_other_tools_beside_the_images_are_counted(tmp_path: Path, draw, write):
    draw("a.jpg", folder="voc")
    write("voc/a.xml", xml("a.jpg", FULL))
    write("voc/a.jpg.aux.xml", "<PAMDataset/>")
    found = open_annotations(tmp_path / "voc", format="voc")
    assert len(objects(found.content)) == 1
    assert [note.split(":")[0] for note in found.notes] == ["XML files of another kind are left out"]
    (tmp_path / "voc" / "a.xml").unlink()
    with pytest.raises(ValueError, match=r"aux\.xml holds <PAMDataset>, not <annotation>"):
        open_annotations(tmp_path / "voc", format="voc")


def test_lists_choose_the_images_of_a_part_and_name_what_is_missing(tmp_path: Path, draw, write):
    draw("a.jpg", "b.jpg", "c 1.jpg", folder="VOC/JPEGImages")
    for name in ("a", "b", "c 1"):
        write(f"VOC/Annotations/{name}.xml", xml(f"{name}.jpg", FULL))
    listing = write("VOC/ImageSets/Main/train.txt", "\ufeffa  1\r\nc 1\nghost -1\n\n")
    for path in (listing, f"{tmp_path / 'VOC'}:train"):
        found = open_annotations(path, format="voc")
        assert [image["file_name"] for image in found.content["images"]] == ["a.jpg", "c 1.jpg"]
        assert found.notes == [
            "images that train.txt lists have no XML file and are left out: 1, the first is ghost -1"
        ]
    with pytest.raises(ValueError, match="has no folder val"):
        open_annotations(f"{tmp_path / 'VOC'}:val", format="voc")


def test_the_image_of_the_files_own_name_counts_for_filename_is_often_old(tmp_path: Path, draw, write):
    images = draw("a.PNG", "sub/b.jpg", "old.jpg")
    write("xml/a.xml", xml("old.jpg", FULL))
    write("xml/annotation of b.xml", xml("C:\\pictures\\sub\\b.jpg", FULL))
    write("xml/gone.xml", xml("gone.jpg", FULL))
    found = open_annotations(tmp_path / "xml", images, "voc")
    assert [image["file_name"] for image in found.content["images"]] == ["a.PNG", "sub/b.jpg"]
    assert found.notes == [
        f"XML files without an image are left out: 1, the first is {tmp_path / 'xml' / 'gone.xml'}",
        "images without an annotation file are left out: 1, the first is old.jpg",
    ]


def test_a_size_that_is_missing_is_the_images(tmp_path: Path, draw, write):
    draw("a.jpg", folder="voc")
    write("voc/a.xml", xml("a.jpg", FULL, size=(0, 0)))
    found = open_annotations(tmp_path / "voc", format="voc")
    assert (found.content["images"][0]["width"], found.content["images"][0]["height"]) == (64, 48)
    assert any("say no size" in note for note in found.notes)


def test_a_list_of_classes_gives_their_order_unless_it_lacks_one(tmp_path: Path, draw, write):
    draw("a.jpg", folder="voc")
    write("voc/a.xml", xml("a.jpg", FULL, ("ant", *FULL[1:])))
    labelmap = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:1,2,3::\nant:4,5,6::\nunused:7,8,9::\n"
    write("voc/labelmap.txt", labelmap)
    found = open_annotations(tmp_path / "voc", format="voc")
    assert [category["name"] for category in found.content["categories"]] == ["cat", "ant", "unused"]
    assert found.notes == []
    write("voc/a.xml", xml("a.jpg", FULL, ("Cat", *FULL[1:])))
    found = open_annotations(tmp_path / "voc", format="voc")
    assert [category["name"] for category in found.content["categories"]] == ["Cat", "cat"]
    assert "that the list beside the files lacks occur, so it is not used: 1, the first is 'Cat' in" in found.notes[0]
    given = open_annotations(tmp_path / "voc", format="voc", classes=["Cat"])
    assert [name for _, name, _ in objects(given.content)] == ["Cat"]
    assert "objects of the unknown class 'cat' are left out: 1, the first is" in given.notes[0]


@pytest.mark.parametrize("corner", ["0", "1"])
def test_difficult_objects_are_crowds_and_rotated_boxes_are_enclosed(tmp_path: Path, draw, write, corner):
    draw("a.jpg", folder="voc")
    turned = (
        "<object><name>ship</name><robndbox><cx>32</cx><cy>24</cy><w>20</w><h>4</h><angle>1.5707963267948966</angle>"
        "</robndbox></object></annotation>"
    )
    text = xml("a.jpg", ("cat", corner, "1", "64", "48", "<difficult>1</difficult>")).replace("</annotation>", turned)
    write("voc/a.xml", text)
    content = open_annotations(tmp_path / "voc", format="voc").content
    assert [entry["iscrowd"] for entry in content["annotations"]] == [1, 0]
    assert content["annotations"][1]["bbox"] == [30, 14, 4, 20]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("<annotation>", r"a\.xml is not an XML file"),
        ("", r"a\.xml is not an XML file"),
        (xml("a.jpg", ("cat", "1", "x", "2", "2")), r"a\.xml, object 1: ymin is 'x', not a number"),
        (xml("a.jpg", ("cat", "1", "nan", "2", "2")), "ymin is 'nan', not a number"),
        (xml("a.jpg", ("", "1", "1", "2", "2")), r"a\.xml, object 1 has no name"),
        ("<annotation><object><name>a</name></object></annotation>", "object 1 has no bndbox"),
        ("<html></html>", "holds <html>, not <annotation>"),
        (xml("a.jpg", ("cat", "0.1", "0.1", "0.5", "0.9")), "seem to be fractions"),
    ],
)
def test_a_fault_is_named_with_file_and_object(tmp_path: Path, draw, write, text, match):
    draw("a.jpg", folder="voc")
    write("voc/a.xml", text)
    with pytest.raises(ValueError, match=match):
        open_annotations(tmp_path / "voc", format="voc")


def test_boxes_that_cannot_be_used_are_counted(tmp_path: Path, draw, write):
    draw("a.jpg", folder="voc")
    write("voc/a.xml", xml("a.jpg", FULL, ("cat", "9", "9", "3", "20"), ("cat", "100", "1", "120", "9")))
    found = open_annotations(tmp_path / "voc", format="voc")
    assert len(found.content["annotations"]) == 1
    assert [note.split(",")[0] for note in found.notes] == [
        "boxes without area are left out: 1",
        "boxes outside of their image are left out: 1",
    ]


def test_a_linked_folder_of_images_is_followed(tmp_path: Path, draw, write):
    images = draw("a.jpg", folder="elsewhere")
    write("voc/Annotations/a.xml", xml("a.jpg", FULL))
    os.symlink(images, tmp_path / "voc" / "JPEGImages")
    assert open_annotations(tmp_path / "voc", format="voc").content["images"][0]["file_name"] == "a.jpg"
